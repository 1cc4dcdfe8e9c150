"""Processes that share one card, as the workers of ``executor=processes`` may."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.score_once import kls

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def test_two_processes_on_one_card_score_as_one(device: torch.device) -> None:
    command = [sys.executable, "-m", "tests.gpu.score_once", str(device), "5"]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    first, second = map(json.loads, said)
    assert first == second == kls(device)
    assert all(min(values) > 0 for values in first.values())
