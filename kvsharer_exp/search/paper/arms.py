"""The arms of an ablation: ways to choose a map, each at every compression ratio.

They ask whether the dissimilarity ranking or the acceptance test makes the paper's maps. The
command ``ablate`` runs them with a `Walker`; ``search`` and the seeds of a ``sweep`` run the walks.

``<order>_tested`` and ``<order>_untested`` walk the ranking in one order, with and without the
test. The other arms use no order of the pairs. An arm with the test may evaluate at most
``max_candidates`` maps, the same number for each such arm. The arms in `PLAN_ARMS` choose KV plans;
`cli.steps.ablation_plans` runs them, because they need more than a ranking.

Paper: https://arxiv.org/abs/2410.18517 §5.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.search.paper.greedy import (
    ORDERS,
    adjacent_pairs,
    greedy,
    num_targets,
    ordered_pairs,
    trailing_layers,
)
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.greedy import GreedyResult, GreedyStep
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap

WALKS = {f"{order}_{test}": order for order in ORDERS for test in ("tested", "untested")}
FIXED = {"trailing_layers": trailing_layers, "adjacent_pairs": adjacent_pairs}
GIVEN = "given"
ARMS = (*WALKS, *FIXED, GIVEN)
READ, JOINT = "read", "joint"
WITHOUT_KV = ("drop", "constant", "affine")
SINGLE = (*WITHOUT_KV, "quantised", "windowed", "snapkv", "h2o")
_EVICTING = ("h2o_alone", "pyramid_alone", "map_h2o", "map_pyramid")
PLAN_ARMS = (READ, *SINGLE, JOINT, *_EVICTING)
_LISTED = 130  # the most characters of the names that an error lists
_DRAW_STRIDE = 1000  # draw 0 is what `kvsharer search search.order=random` finds with that seed


def check_arm(name: str, arms: Sequence[str] = ARMS) -> str:
    """Return ``name`` if it is the name of one of ``arms``.

    Raises:
        InputError: there is no such arm.
    """
    if name not in arms:
        near = difflib.get_close_matches(name, arms, n=1)
        walks = [f"{order}_(un)tested" for order in ORDERS]  # all on one line of a terminal
        all_names = ", ".join([*walks, *(arm for arm in arms if arm not in WALKS)])
        if len(all_names) > _LISTED:
            all_names = all_names[:_LISTED].rpartition(",")[0] + ", … (--help lists all)"
        hint = f"did you mean {near[0]}?" if near else f"choose of {all_names}"
        raise InputError(f"arm {name!r} is unknown: {hint}")
    return name


def is_random(name: str) -> bool:
    """Whether the arm tries pairs in a random order, so that one draw says little."""
    return WALKS.get(name) == "random"


def is_tested(name: str) -> bool:
    """Whether the arm has the acceptance test, which evaluates candidate maps."""
    return name in WALKS and name.endswith("_tested")


@dataclass(frozen=True, slots=True)
class Walker:
    """Runs the arms of one setting and holds what they share.

    Args:
        evaluator: scores candidates on the calibration windows (arms with the test only).
        ranking: the pairs that may share; the walks follow its order.
        threshold: T of the acceptance test.
        all_windows: whether a candidate is scored on all windows even when fewer decide.
        max_candidates: evaluations that an arm with the test may spend; None: the whole ranking.
        given: the maps of the arm ``given``.
    """

    evaluator: Evaluator
    ranking: DissimilarityRanking
    threshold: float = 0.5
    all_windows: bool = False
    max_candidates: int | None = None
    given: tuple[SharingMap, ...] = ()

    def run(
        self,
        arm: str,
        ratios: Sequence[float],
        *,
        seed: int = 0,
        draw: int = 0,
        on_step: Callable[[GreedyStep, int], None] | None = None,
    ) -> list[GreedyResult]:
        """Choose the arm's map at each of ``ratios``.

        ``found`` is below ``requested`` where the arm has no map that large. The same seed and draw
        give the same maps. ``on_step`` is called as by `greedy`.

        Raises:
            InputError: there is no such arm, or a ratio asks for zero or all layers.
        """
        if check_arm(arm) not in WALKS:
            return [self._fixed(arm, ratio) for ratio in ratios]
        self.evaluator.reset()
        try:
            return greedy(
                ordered_pairs(self.ranking, WALKS[arm], seed + _DRAW_STRIDE * draw),
                self.ranking.num_layers,
                ratios,
                advance=self.evaluator.advance if is_tested(arm) else None,
                threshold=self.threshold,
                all_windows=self.all_windows,
                max_candidates=self.max_candidates if is_tested(arm) else None,
                on_step=on_step,
            )
        finally:
            self.evaluator.reset()

    def _fixed(self, arm: str, ratio: float) -> GreedyResult:
        layers = self.ranking.num_layers
        requested = num_targets(ratio, layers)
        if arm == GIVEN:
            sharing_map = largest(self.given, requested, layers)
        else:
            sharing_map = FIXED[arm](self.ranking.pairs, layers, requested)
        return GreedyResult(
            compression=ratio,
            requested=requested,
            found=len(sharing_map.targets),
            kv_source_layers=sharing_map.kv_source_layers,
            candidates=0,
            seconds=0.0,
            trace=(),
        )


def largest(maps: Sequence[SharingMap], requested: int, num_layers: int) -> SharingMap:
    """The map with the most targets, at most ``requested``; the full cache if there is none."""
    fitting = [m for m in maps if len(m.targets) <= requested]
    return max(fitting, key=lambda m: len(m.targets), default=SharingMap.identity(num_layers))


def evaluated(result: GreedyResult) -> int:
    """The number of candidate maps run for this result. Pairs taken untested cost nothing."""
    return sum(step.cosine is not None for step in result.trace)
