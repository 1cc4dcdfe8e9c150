"""What a trial of a KV plan costs, against a trial of a sharing map with the same changed layers.

    python tests/benchmarks/trial_cost.py [--model smollm2] [--dtype bfloat16] [--first 10]

The evaluator knows the states of the full cache, as in a sweep, and a trial runs the layers from
the first changed one on. Every plan changes each fourth layer from there, and the map has these
layers read one source. Plan and map are scored in turn, so that what else the machine does falls on
both. Printed are the counted block forwards, which must be equal, and the median of the ratios of
the paired times with its range. A part of a quantised trial is the price of exact codes: what is
read is quantised and decoded for every query.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from kvsharer_exp.measure.machine import settle

settle()

import torch

from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.windows import token_windows
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.fits import fit_plan
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.load import load_model
from kvsharer_exp.values.plan import KVPlan

STEP = 4
KINDS = {
    "drop": ("x",),
    "constant": ("c",),
    "affine": ("a",),
    "read, drop, constant, affine": ("{source}", "x", "c", "a"),
    "4 bits": ("{layer}q4s4",),
}


def plan_of(num_layers: int, first: int, texts: tuple[str, ...], step: int = STEP) -> KVPlan:
    """Layers ``first``, ``first`` + ``step``, … do what ``texts`` say in turn, others own."""
    actions = [str(layer) for layer in range(num_layers)]
    for number, layer in enumerate(range(first, num_layers, step)):
        actions[layer] = texts[number % len(texts)].format(layer=layer, source=first - 1)
    return KVPlan.parse("_".join(actions))


def trial(evaluator: Evaluator, plan: FittedPlan) -> tuple[float, int]:
    """(seconds, block forwards) of scoring ``plan`` where the states of the full cache are kept."""
    evaluator.reset()
    before, began = evaluator.layers_run, time.perf_counter()
    evaluator.score(plan)
    return time.perf_counter() - began, evaluator.layers_run - before


def compare(
    name: str, evaluator: Evaluator, plan: FittedPlan, base: FittedPlan, repeats: int
) -> None:
    """Print the ratio of the paired times, each pair in the other order than the one before."""
    trial(evaluator, plan)  # warms up
    ratios = []
    for number in range(repeats):
        pair = [plan, base][:: -1 if number % 2 else 1]
        got = {id(one): trial(evaluator, one) for one in pair}
        (seconds, blocks), (base_seconds, base_blocks) = got[id(plan)], got[id(base)]
        assert blocks == base_blocks, f"{name}: {blocks} block forwards, the map {base_blocks}"
        ratios.append(seconds / base_seconds)
    low, high = min(ratios), max(ratios)
    print(
        f"{name}: {median(ratios):.2f} ({low:.2f}–{high:.2f}) times the map's "
        f"{base_seconds:.2f} s; {blocks} block forwards each",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--first", type=int, default=10, help="the first changed layer")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    windows = token_windows(
        split_texts().calibration, tokenizer, num_windows=32, window_tokens=256, seed=0
    )
    scored, for_fits = torch.split(windows, [24, 8])
    evaluator = Evaluator(model, scored)
    _ = evaluator.full_scores
    layers, first = evaluator.num_layers, options.first
    base = FittedPlan(plan_of(layers, first, ("{source}",)))
    for name, texts in KINDS.items():
        plan = fit_plan(model, plan_of(layers, first, texts), for_fits)
        compare(name, evaluator, plan, base, options.repeats)
    everywhere = FittedPlan(plan_of(layers, first, KINDS["4 bits"], step=1))
    compare(f"4 bits in all layers from {first} on", evaluator, everywhere, base, options.repeats)


if __name__ == "__main__":
    main()
