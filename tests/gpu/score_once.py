"""Score the plans of the GPU tests on the tiny model and print the KL of every window as JSON.

    python -m tests.gpu.score_once DEVICE ROUNDS

`test_processes.py` starts it several times at once, so that processes share one card.
"""

import json
import sys

import torch

from kvsharer_exp.measure.evaluator import Evaluator
from tests.gpu.models import PLANS, llama_on, plan
from tests.tiny import tokens


def kls(device: torch.device, rounds: int = 1) -> dict[str, list[float]]:
    """By plan the KL of each window; every one of the ``rounds`` must give the same numbers."""
    model, windows = llama_on(device, torch.bfloat16), tokens(8, 64)
    with torch.inference_mode():
        found = [
            {name: list(Evaluator(model, windows).score(plan(name)).kls) for name in PLANS}
            for _ in range(rounds)
        ]
    assert all(one == found[0] for one in found)
    return found[0]


if __name__ == "__main__":
    print(json.dumps(kls(torch.device(sys.argv[1]), int(sys.argv[2]))))
