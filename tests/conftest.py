"""What the whole session needs once, because it takes seconds: an MLflow store, the text read."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from kvsharer_exp.cli.session import windows
from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.measure.machine import settle

settle()  # as the command line does, before torch
# A machine that is busy with other tests is no fault of a test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that send MLflow and the studies to a folder of the test session."""
    folder = tmp_path_factory.mktemp("mlruns")
    return [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"tracking.folder={folder}"]


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """Have the commands of one process read Wikipedia once, with each tokenizer."""
    known: dict[str, dict[str, list[int]]] = defaultdict(dict)
    split = windows.split_texts
    wikipedia = functools.cache(split)

    class Remembering(windows.RememberingTokenizer):
        def __init__(self, tokenizer: Any) -> None:
            super().__init__(tokenizer)
            self._known = known[tokenizer.backend_tokenizer.to_str()]

    def texts(*sources: str) -> TextParts:
        return (wikipedia if set(sources) == {"wikipedia"} else split)(*sources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "RememberingTokenizer", Remembering)
        patch.setattr(windows, "split_texts", texts)
        yield
