"""The fake engine of ``tests/fake_engine``, and what is left of a server's processes."""

import sys
import time
from pathlib import Path

import psutil

FAKE = Path(__file__).parent / "fake_engine"


def fake_settings(behaviour: str, pids: Path, blocks: int = 1) -> dict[str, str]:
    """The environment variables that make the running Python the fake engine."""
    paths = [str(FAKE), str(FAKE.parents[1])]
    return {
        "PYTHONPATH": ":".join(paths),
        "FAKE_VLLM": behaviour,
        "FAKE_PIDS": str(pids),
        "FAKE_BLOCKS": str(blocks),
        "KVSHARER_ENGINE_PYTHON": sys.executable,
    }


def left(pids: Path) -> list[int]:
    """The processes of a fake server that still run, a second after it was stopped."""
    recorded = [int(pid) for pid in pids.read_text().split()]
    assert len(recorded) == 2
    deadline = time.monotonic() + 1
    while (found := list(filter(_runs, recorded))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
