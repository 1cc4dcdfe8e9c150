"""What the tests in vLLM share: a tokenizer, and whether there is an engine to run them in."""

import os
from typing import Any

import pytest

from kvsharer_exp import load_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    if not os.environ.get("KVSHARER_ENGINE_PYTHON"):
        pytest.fail("KVSHARER_ENGINE_PYTHON names no Python with vLLM: run make engine")
    return load_model("tiny", device="cpu")[1]
