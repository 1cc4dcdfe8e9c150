"""The device of the GPU tests: CUDA, or the CPU in a rehearsal that finds faults of the tests."""

import os

import pytest
import torch

from tests.gpu.models import REHEARSAL


@pytest.fixture(scope="session")
def device() -> torch.device:
    if os.environ.get(REHEARSAL) == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"there is no CUDA device here; {REHEARSAL}=1 rehearses on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for what a CPU cannot even rehearse."""
    if device.type != "cuda":
        pytest.skip("this needs CUDA itself: no rehearsal on the CPU")
    return device


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
