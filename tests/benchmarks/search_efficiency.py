"""Which search finds the best maps for equal numbers of evaluated tokens?

    python tests/benchmarks/search_efficiency.py [--model smollm2] [--tokens 120000]

Every sampler searches the same space with the same stages until it has evaluated ``--tokens``
calibration tokens (windows × tokens of every stage a map went through); the greedy walks of both
orders stand beside them with the tokens they need. "Seeded" searches start from the greedy maps,
simple layouts and the maps of least block error, and our samplers know the block errors, whose cost
is counted (a pair is one block's work). Per method: hypervolume (reference: all KV, 2 nats), best
KL per number of shared layers, and the perplexity of those maps on held-out text over the full
cache's; mean and 95 % interval over seeds. A seed changes the sampler and the calibration windows.
Writes ``search_efficiency.json``, ``.md`` and ``.png`` to ``--out``; run again, it goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kvsharer_exp.measure.machine import settle

settle()


from kvsharer_exp.cli.session.calibration import ERROR_WINDOWS
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.windows import token_windows
from kvsharer_exp.measure.calibration import block_errors, layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.perplexity import window_losses
from kvsharer_exp.measure.ranking import BLOCK_OUTPUT, distance_matrix, rank
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.load import load_model
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.reporting.figures.style import CYCLE, GREY, empty, save_png
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.search.bars import Bars
from kvsharer_exp.search.coordinator import Search, run_search
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.front import GrowingFront, best_per_rung
from kvsharer_exp.search.outcome import FIT, screen
from kvsharer_exp.search.paper.arms import Walker
from kvsharer_exp.search.paper.greedy import CUTS, adjacent_pairs, num_targets, trailing_layers
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.search.spaces.registry import make_space
from kvsharer_exp.search.stages import StagedScorer
from kvsharer_exp.search.study import open_study
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.values.intervals import t_interval
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult

REFERENCE = (1.0, -2.0)
SCREEN_WINDOWS = [2, 8]  # those of a sweep
# Name → sampler, and whether it is seeded.
SEARCHES = {
    "random": ("random", False),
    "tpe": ("tpe", False),
    "tpe, seeded": ("tpe", True),
    "nsgaii, seeded": ("nsgaii", True),
    "evolution": ("evolution", False),
    "evolution, seeded": ("evolution", True),
    "beam": ("beam", False),
    "beam, seeded": ("beam", True),
}
Curve = Sequence[Sequence[float]]  # (tokens, hypervolume) after every map
OPTIONS = {"tpe": {"multivariate": True}, "nsgaii": {"population_size": 20}}


class Bench:
    """One calibration seed: ranking, evaluator, greedy maps, block errors."""

    def __init__(self, model: Any, tokenizer: Any, options: argparse.Namespace, seed: int) -> None:
        self.model, self.options, self.seed = model, options, seed
        parts = split_texts()
        windows = token_windows(
            parts.calibration,
            tokenizer,
            num_windows=options.windows,
            window_tokens=options.window_tokens,
            seed=seed,
        )
        matrix = distance_matrix(model, layer_means(model, windows), distance="euclidean_flat")
        self.ranking = rank(matrix, model_id=options.model, distance="euclidean_flat")
        self.evaluator = Evaluator(model, windows, cuts=SCREEN_WINDOWS)
        walking = Evaluator(model, windows, cuts=CUTS)
        few = windows[:ERROR_WINDOWS]
        self.errors = block_errors(model, few)
        self.error_tokens = len(self.ranking.pairs) * few.numel() // self.ranking.num_layers
        self.sizes = sorted({*options.sizes, *_asked(self.ranking)})
        walker = Walker(walking, self.ranking, max_candidates=3 * max(self.sizes))
        ratios = [size / self.ranking.num_layers for size in self.sizes]
        self.walks = {
            order: walker.run(f"{order}_tested", ratios) for order in ("dissimilar", "similar")
        }

    def maps(self, order: str) -> list[SharingMap]:
        """Those of a greedy walk that have as many targets as asked for."""
        walk = self.walks[order]
        return [SharingMap(r.kv_source_layers) for r in walk if r.found == r.requested]

    def seeds(self) -> list[tuple[str, SharingMap]]:
        pairs, layers = self.ranking.pairs, self.ranking.num_layers
        both = [("greedy", m) for order in self.walks for m in self.maps(order)]
        simple = [
            (make.__name__, make(pairs, layers, size))
            for make in (trailing_layers, adjacent_pairs)
            for size in self.sizes
        ]
        errors = rank(self.errors, model_id="", distance=BLOCK_OUTPUT)
        ratios = [size / layers for size in self.sizes]
        least = Walker(self.evaluator, errors).run("similar_untested", ratios)
        found = [("least block error", SharingMap(result.kv_source_layers)) for result in least]
        return [*found, *both, *simple]

    def tokens(self, result: TrialResult) -> int:
        """Calibration tokens a map was evaluated on."""
        seen = [n for n in SCREEN_WINDOWS if screen(n) in result.scores]
        windows = self.options.windows if FIT in result.scores else seen[-1]
        return windows * self.options.window_tokens

    def search(self, sampler: str, seeded: bool) -> list[TrialResult]:
        spent = self.error_tokens if seeded else 0

        def is_over(result: TrialResult) -> bool:
            nonlocal spent
            spent += self.tokens(result)
            return spent >= self.options.tokens

        space = make_space("layer_sources", self.ranking, max_shared=max(self.sizes))
        with (
            tempfile.TemporaryDirectory() as folder,
            open_study("bench", storage=None, folder=Path(folder)) as store,
        ):
            return run_search(
                store,
                Search(
                    space,
                    make_sampler(
                        sampler,
                        space=space,
                        seed=self.seed,
                        errors=self.errors if seeded else None,
                        **OPTIONS.get(sampler, {}),
                    ),
                    lambda sharing_map: footprint(self.model, sharing_map),
                    self.seeds() if seeded else (),
                    Bars(SCREEN_WINDOWS),
                ),
                LocalExecutor(
                    StagedScorer(
                        self.model,
                        self.evaluator,
                        fitness={"kl": 1.0},
                        screen_windows=SCREEN_WINDOWS,
                    )
                ),
                on_result=is_over,
            )

    def walked(self, order: str) -> list[TrialResult]:
        """The maps of a greedy walk as if they were trials, their KL measured afterwards."""
        scorer = StagedScorer(self.model, self.evaluator, fitness={"kl": 1.0})
        found = []
        for number, sharing_map in enumerate(self.maps(order)):
            size = footprint(self.model, sharing_map)
            outcome = scorer(sharing_map, size, ())
            found.append(
                TrialResult(
                    number, {}, sharing_map, outcome.scores, size, outcome.status, "fit", 0.0,
                    outcome.score,
                )
            )  # fmt: skip
        return found


def _asked(ranking: DissimilarityRanking) -> list[int]:
    return [num_targets(ratio, ranking.num_layers) for ratio in (0.125, 0.25, 0.375)]


class HeldOut:
    """Perplexity of maps over the full cache's on text no search saw; each map once.

    ``known``: losses by window of maps measured before, which new ones are added to.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        num_windows: int,
        known: dict[SharingMap, list[float]] | None = None,
    ) -> None:
        self._model = model
        self._windows = token_windows(
            split_texts().report, tokenizer, num_windows=num_windows, window_tokens=256, seed=0
        )
        self.known = {} if known is None else known

    def __call__(self, sharing_map: SharingMap, windows: int | None = None) -> float:
        """On the first ``windows``; None: on all."""
        return math.exp(fmean(self._lost(sharing_map, windows)))

    def interval(self, sharing_map: SharingMap) -> tuple[float, float]:
        """95 %, over windows."""
        mean = t_interval(self._lost(sharing_map))
        return math.exp(mean.low), math.exp(mean.high)

    def draws(self, sharing_map: SharingMap, windows: int) -> list[float]:
        """On the first ``windows``, on the next, and so on."""
        lost = self._lost(sharing_map)
        parts = (lost[start : start + windows] for start in range(0, len(lost), windows))
        return [math.exp(fmean(part)) for part in parts]

    def _lost(self, sharing_map: SharingMap, windows: int | None = None) -> list[float]:
        """By window, the log of its perplexity over the full cache's."""
        full = SharingMap.identity(sharing_map.num_layers)
        pairs = zip(self._losses(sharing_map, windows), self._losses(full, windows), strict=True)
        return [lost - kept for lost, kept in pairs]

    def _losses(self, sharing_map: SharingMap, windows: int | None) -> list[float]:
        known, asked = self.known.setdefault(sharing_map, []), self._windows[:windows]
        if len(known) < len(asked):
            with share_kv(self._model, sharing_map):
                known += window_losses(self._model, asked[len(known) :])
        return known[: len(asked)]


def measure(bench: Bench, held_out: HeldOut, method: str) -> dict[str, Any]:
    started = time.perf_counter()
    if method.endswith("greedy"):
        order = "dissimilar" if method.startswith("paper") else "similar"
        found = bench.walked(order)
        spent = sum(step.windows for step in bench.walks[order][-1].trace)
        volume = GrowingFront(found, REFERENCE).volumes[-1]
        curve = [(spent * bench.options.window_tokens, volume)]
    else:
        sampler, seeded = SEARCHES[method]
        found = bench.search(sampler, seeded)
        spent_so_far = bench.error_tokens if seeded else 0
        volumes, curve = GrowingFront(found, REFERENCE).volumes, []
        for result, volume in zip(found, volumes, strict=True):
            spent_so_far += bench.tokens(result)
            curve.append((spent_so_far, volume))
    seconds = time.perf_counter() - started
    best = {
        size: result for size, result in best_per_rung(found).items() if size in bench.options.sizes
    }
    return {
        "method": method,
        "seed": bench.seed,
        "maps": len(found),
        "tokens": curve[-1][0],
        "seconds": seconds,
        "hypervolume": curve[-1][1],
        "curve": curve,
        "kl": {str(size): result.scores["kl"] for size, result in best.items()},
        "perplexity_ratio": {str(s): held_out(r.sharing_map) for s, r in best.items()},
        "maps_by_size": {str(s): str(r.sharing_map) for s, r in best.items()},
    }


def table(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """Markdown: one row per method, mean ± half the 95 % interval over seeds."""

    def cell(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "–"
        interval = t_interval(known) if len(known) > 1 else None
        half = f" ± {interval.high - interval.mean:.3f}" if interval is not None else ""
        return f"{sum(known) / len(known):.3f}{half}"

    lines = [
        [
            *("method", "tokens", "maps", "hypervolume"),
            *[f"KL, {size} shared" for size in sizes],
            *[f"ppl ratio, {size}" for size in sizes],
        ]
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        mean = {key: round(sum(r[key] for r in mine) / len(mine)) for key in ("tokens", "maps")}
        lines.append(
            [
                *(method, f"{mean['tokens']:,}", str(mean["maps"])),
                cell(row["hypervolume"] for row in mine),
                *[cell(row["kl"].get(str(size)) for row in mine) for size in sizes],
                *[cell(row["perplexity_ratio"].get(str(size)) for row in mine) for size in sizes],
            ]
        )
    return to_markdown(lines)


def savings(rows: Sequence[dict[str, Any]], budgets: Sequence[int]) -> str:
    """Markdown: what part of the unseeded search's tokens the seeded one takes to come as far.

    One row per sampler and budget, one column per seed, and one for the means over seeds of both
    curves; "more" where it never came as far.
    """
    curves = {(row["method"], row["seed"]): row["curve"] for row in rows}
    seeds = sorted({seed for _, seed in curves})
    lines = [["sampler", "tokens, unseeded", *[f"seed {seed}" for seed in seeds], "mean curves"]]
    for method in dict.fromkeys(method for method, _ in curves):
        told = f"{method}, seeded"
        if told not in SEARCHES:
            continue
        pairs = [(curves.get((method, seed)), curves.get((told, seed))) for seed in seeds]
        both = [pair for pair in pairs if all(pair)]
        if both:
            pairs.append(tuple(mean_curve(side) for side in zip(*both, strict=True)))
        for budget in budgets:
            cells = [_part(one, other, budget) if one and other else "–" for one, other in pairs]
            lines.append([method, f"{budget:,}", *cells])
    return to_markdown(lines)


def _part(unseeded: Curve, seeded: Curve, budget: int) -> str:
    final = next((volume for tokens, volume in unseeded if tokens >= budget), unseeded[-1][1])
    spent = next((tokens for tokens, volume in seeded if volume >= final), None)
    return "more" if spent is None else f"{100 * spent / budget:.0f} %"


def heights(curves: Sequence[Curve]) -> dict[int, list[float]]:
    """By tokens, what each curve has reached, for every number of tokens that one of them has."""
    steps = sorted({tokens for curve in curves for tokens, _ in curve})
    return {
        step: [max((v for t, v in curve if t <= step), default=0.0) for curve in curves]
        for step in steps
    }


def mean_curve(curves: Sequence[Curve]) -> Curve:
    return [(step, fmean(reached)) for step, reached in heights(curves).items()]


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Hypervolume over evaluated tokens: mean over seeds, the band from lowest to highest."""
    drawn, axes = empty(7.4, 4.6)
    colours = [*CYCLE, GREY, "black"]
    names = [m for m in dict.fromkeys(r["method"] for r in rows) if m in SEARCHES]
    for method, colour in zip(names, colours[: len(names)], strict=True):
        curves = [row["curve"] for row in rows if row["method"] == method]
        reached = heights(curves)
        steps = list(reached)
        mean, low, high = ([f(v) for v in reached.values()] for f in (fmean, min, max))
        axes.plot(steps, mean, color=colour, label=method)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for method, marker in (("paper greedy", "s"), ("similar-first greedy", "^")):
        points = [row["curve"][-1] for row in rows if row["method"] == method]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, marker=marker, color="black", s=24, label=method, zorder=3)
    axes.set(xlabel="calibration tokens evaluated", ylabel="hypervolume of the front")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def main() -> None:
    methods = ["paper greedy", "similar-first greedy", *SEARCHES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--window-tokens", type=int, default=64)
    parser.add_argument("--heldout-windows", type=int, default=24)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 7])
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--out", type=Path, default=Path("outputs/search_efficiency"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    held_out = HeldOut(model, tokenizer, options.heldout_windows)
    settings = {k: v for k, v in vars(options).items() if k not in ("seeds", "methods", "out")}
    record = options.out / "search_efficiency.json"
    held = json.loads(record.read_text()) if record.exists() else {}
    rows: list[dict[str, Any]] = held["rows"] if held.get("options") == settings else []
    for seed in options.seeds:
        done = {row["method"] for row in rows if row["seed"] == seed}
        left = [method for method in options.methods if method not in done]
        bench = Bench(model, tokenizer, options, seed) if left else None
        for method in left:
            assert bench is not None
            rows.append(measure(bench, held_out, method))
            shown = {k: v for k, v in rows[-1].items() if k not in ("curve", "maps_by_size")}
            print(json.dumps(shown), flush=True)
            held = {"options": settings, "environment": environment(), "rows": rows}
            record.write_text(json.dumps(held) + "\n")
    rows.sort(key=lambda row: (methods.index(row["method"]), row["seed"]))
    text = table(rows, options.sizes)
    text += "\n" + savings(rows, [options.tokens // 2, options.tokens])
    (options.out / "search_efficiency.md").write_text(text)
    (options.out / "search_efficiency.png").write_bytes(save_png(figure(rows)))
    print(text)


if __name__ == "__main__":
    main()
