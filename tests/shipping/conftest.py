"""What the tests of exports share: a tokenizer, and a place for code that transformers copies."""

from typing import Any

import pytest

from kvsharer_exp import load_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_model("tiny", device="cpu")[1]


@pytest.fixture(scope="session", autouse=True)
def _modules_elsewhere(tmp_path_factory: pytest.TempPathFactory):
    """transformers copies the code of an export to a folder that is then on the path."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield
