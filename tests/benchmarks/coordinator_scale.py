"""How many workers one coordinator keeps busy, in simulated time.

    python tests/benchmarks/coordinator_scale.py --workers 1 8 64 1000 --trials 2000 --seconds 60

It runs the coordinator of ``sweep`` itself, on a study in a journal file. Only the clock and the
executor are replaced. A plan takes ``--seconds`` on average, log-normal with a spread of a half.
What the coordinator does between two results takes as long as it really takes, and is added to the
simulated time. So workers are idle while it is at work, as they would be.

Quality is the best loss at each rung of bytes, as a ratio to the optimum of the made losses, which
are sums of costs that the block errors tell roughly. More workers than one ask with knowledge that
is staler: the regret is in the column. With several ``--seeds``, of the sampler and of the times of
the plans, numbers are means over them, and the ratio has its standard deviation.
"""

import argparse
import heapq
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from kvsharer_exp.search.coordinator import Coordinator, Limits, Search
from kvsharer_exp.search.execution.base import Done, Task
from kvsharer_exp.search.front import best_per_rung
from kvsharer_exp.search.outcome import FIT, Outcome
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.search.spaces.layer_actions import LayerActions, Priced
from kvsharer_exp.search.spaces.registry import make_space
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.trial import TrialResult
from tests.benchmarks.kept import keep_results
from tests.search.test_layer_actions import candidates


class Model:
    """Made losses of plans: costs that add up, and grow a little with what is given up."""

    def __init__(self, layers: int) -> None:
        pairs = tuple(LayerPair(t, s, float(t - s)) for t in range(layers) for s in range(t))
        found = candidates(layers=layers)
        space = make_space(
            "layer_actions",
            DissimilarityRanking("m", "d", layers, pairs),
            max_shared=3,
            candidates=found,
            budgets=(0.1, 0.3),
        )
        assert isinstance(space, LayerActions)
        self.space = space
        dice = np.random.default_rng(1)
        self.costs = {(c.layer, c.action): c.error * dice.lognormal(0, 0.4) for c in found}
        self.best = {r: self.loss(plan) for r, plan in Priced(space, self.costs).solve().items()}

    def loss(self, plan: KVPlan) -> float:
        parts = [self.costs.get((i, a), 0.0) for i, a in enumerate(plan.actions)]
        return max(1e-6, sum(parts) * (1 + 0.02 * sum(part > 0 for part in parts)))

    def size(self, plan: KVPlan) -> Footprint:
        kept = self.space.kv_bytes(plan)
        return Footprint(kept, kept / self.space.full_bytes, 0)

    def regret(self, results: Sequence[TrialResult]) -> float:
        """The mean over the rungs of how far the best loss is above the least, as a ratio."""
        found, low, high = best_per_rung(results, self.space.steps), *self.space.rungs
        ratios = []
        for rung in (r for r in self.best if low <= r <= high):
            at = [self.loss(one.plan) for step, one in found.items() if step <= rung]
            ratios.append(math.log(min(at, default=10.0) / self.best[rung]))
        return math.exp(fmean(ratios))


class Simulated:
    """Workers in simulated time (`base.Executor`), and the clock of it."""

    def __init__(self, model: Model, workers: int, seconds: float, seed: int) -> None:
        self._model, self._workers, self._seconds = model, workers, seconds
        self._dice = np.random.default_rng(seed)
        self._running: list[tuple[float, int, Task, float]] = []
        self.now = self.busy = 0.0
        self._since = time.perf_counter()
        self.coordinating: list[float] = []  # real seconds of the coordinator for each result

    def clock(self) -> float:
        return self.now

    @property
    def room(self) -> int:
        return self._workers - len(self._running)

    def submit(self, tasks: Sequence[Task]) -> None:
        self._pass()
        for task in tasks:
            seconds = self._seconds * self._dice.lognormal(-0.125, 0.5)
            self.busy += seconds
            heapq.heappush(self._running, (self.now + seconds, task.number, task, seconds))

    def wait(self) -> list[Done]:
        self._pass()
        self.coordinating.append(self._spent)
        end, _, task, seconds = heapq.heappop(self._running)
        self.now = max(self.now, end)
        loss = self._model.loss(task.plan)
        outcome = Outcome({FIT: loss, "kl": loss}, "complete", "fit", -loss, "", (loss, loss))
        self._since, self._spent = time.perf_counter(), 0.0
        return [Done(task.number, outcome, seconds)]

    _spent = 0.0

    def _pass(self) -> None:
        """Let the simulated time go on by what the coordinator has really taken."""
        spent = time.perf_counter() - self._since
        self._since += spent
        self._spent += spent
        self.now += spent

    def withdraw(self) -> list[Task]:
        return []


def simulate(
    model: Model, workers: int, n_trials: int, seconds: float, sampler: str, seed: int
) -> dict[str, Any]:
    executor = Simulated(model, workers, seconds, seed)
    with tempfile.TemporaryDirectory() as folder:
        with open_study("simulated", storage=None, folder=Path(folder)) as store:
            made = make_sampler(sampler, space=model.space, seed=seed)
            search = Search(model.space, made, model.size)
            coordinator = Coordinator(store, search, executor, clock=executor.clock)
            found = coordinator.run(Limits(n_trials))
    # Before the first hundred results seeds are solved, and behind the last ones nothing is asked.
    asked = executor.coordinating[100 : n_trials - workers] or executor.coordinating
    some = max(1, min(1000, len(asked) // 4))
    # All workers begin at once and end one by one: the ends do not say how busy they are kept.
    return {
        "sampler": sampler,
        "workers": workers,
        "seed": seed,
        "trials": len(found),
        "busy": executor.busy / (workers * executor.now),
        "could_be_busy": min(1.0, seconds / (workers * fmean(executor.coordinating))),
        "seconds_per_trial": fmean(executor.coordinating),
        "late_over_early": fmean(asked[-some:]) / fmean(asked[:some]),
        "ratio_to_optimum": model.regret(found),
    }


def averaged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for those of several seeds."""
    ratios = [row["ratio_to_optimum"] for row in rows]
    means = {k: fmean(row[k] for row in rows) for k, v in rows[0].items() if isinstance(v, float)}
    return {**rows[0], **means, "deviation": stdev(ratios) if len(rows) > 1 else None}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| sampler | workers | trials | busy | busy in the long run | coordinator, ms a trial "
        "| late / early | best losses / optimum |",
        "| --- " * 8 + "|",
    ]
    same = groupby(rows, key=itemgetter("sampler", "trials", "workers"))
    for row in (averaged(list(seeds)) for _, seeds in same):
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
        lines.append(
            f"| {row['sampler']} | {row['workers']:,} | {row['trials']:,} | {row['busy']:.1%} "
            f"| {row['could_be_busy']:.1%} | {1000 * row['seconds_per_trial']:.2f} "
            f"| {row['late_over_early']:.2f} | {row['ratio_to_optimum']:.3f}{spread} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 1000])
    parser.add_argument("--trials", type=int, nargs="+", default=[2000])
    parser.add_argument("--seconds", type=float, default=60.0, help="of a plan, on average")
    parser.add_argument("--samplers", nargs="+", default=["random", "evolution"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = Model(options.layers)
    rows = []
    for sampler in options.samplers:
        for n_trials in options.trials:
            for workers in options.workers:
                if workers < n_trials:
                    asked = workers, n_trials, options.seconds, sampler
                    rows += [simulate(model, *asked, seed) for seed in options.seeds]
                    sys.stdout.write(table(rows[-len(options.seeds) :]).splitlines()[-1] + "\n")
                    sys.stdout.flush()
    keep_results(options.out, "coordinator_scale", table(rows), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
