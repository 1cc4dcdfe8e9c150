"""How long it takes to solve KV plans for every budget of bytes, and how good they are at least.

    python tests/benchmarks/solver.py [--layers 80] [--repeats 5] [--seed 7]

The losses are made up: four times as much for each bit less, and a factor that differs by layer,
for nine actions a layer and eight sources that it may read. First all budgets are solved at once,
without the reads: most of that time is the making of plans, so a search asks for the best of each
rung, a 64th of the bytes. Then comes the integer program with the reads, for nine budgets: the sum
of the times, and the largest gap to the bound that no plan can go below. Times are medians.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median

from kvsharer_exp.search.solver import solve_all, solve_front_with_reads
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.choice import Choice, ReadChoice

OWNED = (Own(), Own(8), Own(4), Own(3, 64, 4), Own(2), Own(2, 32, 4))
WITHOUT_KV = (Drop(), Constant(), Affine())
SOURCES = 8
SIZES = (4096, 0, 3, 64, 2)  # tokens seen, padding, KV heads, their size, bytes of a number


def made_up(layers: int, seed: int) -> tuple[list[Choice], list[ReadChoice]]:
    """Losses and bytes of `OWNED` and `WITHOUT_KV` at each layer, and of reading `SOURCES`."""
    draw = random.Random(seed)
    choices, reads = [], []
    for layer in range(layers):
        weight = draw.lognormvariate(0, 1)
        for own in OWNED:
            kept = own.precision.key_bytes(*SIZES) + own.precision.value_bytes(*SIZES)
            choices.append(
                Choice(layer, own, weight * 4.0**-own.bits * draw.uniform(0.5, 1.5), kept)
            )
        for action in WITHOUT_KV:
            choices.append(Choice(layer, action, weight * draw.uniform(0.5, 1.5), 0))
        for source in draw.sample(range(layer), min(layer, SOURCES)):
            loss = weight * draw.uniform(0.3, 1.5)
            losses = {own: loss * (1 + 4.0**-own.bits) for own in OWNED}
            reads.append(ReadChoice(layer, source, losses))
    return choices, reads


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of the seconds that ``work`` takes."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def main() -> None:
    """Solve both ways and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    choices, reads = made_up(asked.layers, asked.seed)
    full = sum(c.kv_bytes for c in choices if c.action == Own())
    print(f"{asked.layers} layers, every budget at once, no reads:")
    for what, step in (
        ("every plan that no other beats", 1),
        ("the best of each rung", full // 64),
    ):
        plans = len(solve_all(choices, step=step))
        spent = seconds(partial(solve_all, choices, step=step), asked.repeats)
        print(f"  {what}: {plans} plans in {spent:.2f} s")
    budgets = [full * i // 10 for i in range(1, 10)]
    found = solve_front_with_reads(choices, reads, budgets)
    spent = seconds(partial(solve_front_with_reads, choices, reads, budgets), asked.repeats)
    gap = max((solved.loss - bound) / solved.loss for solved, bound in found)
    readers = sum(len(solved.plan.targets) for solved, _ in found)
    print(f"with {len(reads)} reads, {len(budgets)} budgets: {spent:.2f} s, gap at most {gap:.2%}")
    print(f"  layers that read another one in these plans: {readers}")


if __name__ == "__main__":
    main()
