"""Learn from the calibration windows: the ranking, the block errors and the acceptance test.

The commands ``calibrate``, ``search``, ``sweep`` and ``ablate`` ask for a `Calibration`. Everything
is computed when it is first asked for, and only once. An ablation varies the settings with
`Calibration.varied`. If the text stays the same, what was computed from it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.measure.calibration import LayerMeans, block_errors, layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.ranking import BLOCK_OUTPUT, distance_matrix, rank
from kvsharer_exp.reporting.figures.ranking import distance_heatmap
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.search.paper.arms import Walker
from kvsharer_exp.search.paper.greedy import CUTS
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.greedy import GreedyResult, GreedyStep
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap

# On SmolLM2, rho of block errors with the KL of single pairs is 0.95 with 8 and 0.94 with 30.
ERROR_WINDOWS = 8


class CalibrationText:
    """What depends on the calibration windows only, and not on how layers are compared."""

    def __init__(self, config: Config, loaded: LoadedModel, windows: Windows) -> None:
        self._scoring, self._loaded, self.windows = config.scoring, loaded, windows
        self._evaluator: Evaluator | None = None

    @cached_property
    def means(self) -> LayerMeans:
        windows = self.windows.calibration
        return layer_means(self._loaded.model, windows, batch_size=self._scoring.batch_size)

    @cached_property
    def block_errors(self) -> list[list[float]]:
        """``[target][source]``, on the first few windows: more of them order pairs no better."""
        return block_errors(self._loaded.model, self.windows.calibration[:ERROR_WINDOWS])

    @property
    def evaluator(self) -> Evaluator:
        """Scores maps on the calibration windows, for the acceptance test of the paper."""
        if self._evaluator is None:
            self._evaluator = Evaluator(
                self._loaded.model,
                self.windows.calibration,
                batch_size=self._scoring.batch_size,
                cuts=CUTS,
                memory_budget=self._scoring.memory_budget,
            )
        return self._evaluator

    @property
    def kept_bytes(self) -> int:
        """Bytes that the evaluator holds now; 0 if none was made."""
        return self._evaluator.kept_bytes if self._evaluator is not None else 0


class Calibration:
    """The distances between layers, and the ranking by them, under one configuration."""

    def __init__(self, config: Config, loaded: LoadedModel, windows: Windows) -> None:
        self.config, self._loaded = config, loaded
        self.text = CalibrationText(config, loaded, windows)

    def varied(self, config: Config) -> Calibration:
        """The calibration of the same model under another ``calibration`` and ``search``."""
        before, after = self.config.calibration, config.calibration
        other = Calibration(config, self._loaded, Windows(config, self._loaded))
        if (before.path, before.num_windows) == (after.path, after.num_windows):
            other.text = self.text
        return other

    @cached_property
    def distances(self) -> list[list[float]]:
        """``[target][source]`` by ``calibration.distance``; NaN if the pair may not share."""
        wanted = self.config.calibration
        if wanted.distance == BLOCK_OUTPUT:
            for target, row in enumerate(self.text.block_errors):
                overflowing = [source for source, error in enumerate(row) if error == math.inf]
                if overflowing:
                    raise NotFiniteError(
                        f"layer {target} overflows where it reads layer {overflowing[0]}: "
                        "try model.dtype=bfloat16 or float32, or another calibration.distance"
                    )
            return self.text.block_errors
        return distance_matrix(
            self._loaded.model, self.text.means, distance=wanted.distance, states=wanted.states
        )

    @cached_property
    def ranking(self) -> DissimilarityRanking:
        """The pairs that may share, most dissimilar first by ``calibration.distance``."""
        return self._rank(self.distances, self.config.calibration.distance)

    def error_walker(self) -> Walker:
        """Make a walker over the ranking by block errors, in which the least error is last."""
        return Walker(self.text.evaluator, self._rank(self.text.block_errors, BLOCK_OUTPUT))

    def rank_by(self, distance: str, key_weight: float) -> DissimilarityRanking:
        """Rank the pairs by ``distance`` with this weight of the keys (see `distance_matrix`)."""
        matrix = distance_matrix(
            self._loaded.model, self.text.means, distance=distance, key_weight=key_weight
        )
        return self._rank(matrix, distance)

    def walker(
        self, *, max_candidates: int | None = None, given: tuple[SharingMap, ...] = ()
    ) -> Walker:
        """Make a walker over the ranking, with the acceptance test that ``search`` sets."""
        return Walker(
            self.text.evaluator,
            self.ranking,
            threshold=self.config.search.threshold,
            all_windows=self.config.search.all_windows,
            max_candidates=max_candidates,
            given=given,
        )

    def walk(
        self,
        log: RunLog,
        order: str,
        ratios: Sequence[float],
        *,
        max_candidates: int | None = None,
    ) -> list[GreedyResult]:
        """Find the greedy maps for ``ratios`` in this order of pairs; ``log`` tells progress."""

        def on_step(step: GreedyStep, count: int) -> None:
            if step.accepted:
                log.say(f"{order}: {step.target} reads {step.source}, {count} shared")

        arm = f"{order}_{'tested' if self.config.search.acceptance else 'untested'}"
        walker = self.walker(max_candidates=max_candidates)
        return walker.run(arm, ratios, seed=self.config.seed, on_step=on_step)

    def keep_ranking(self, log: RunLog) -> None:
        """Write the ranking and its heat map into the run folder and MLflow."""
        distance = self.config.calibration.distance
        log.say(f"ranked {len(self.ranking.pairs)} pairs of layers by {distance}")
        title = f"{self._loaded.name}: {distance} between layers' mean KV"
        log.keep("ranking.json", self.ranking.to_json() + "\n")
        log.keep("distances.png", save_png(distance_heatmap(self.distances, title)))

    def _rank(self, matrix: list[list[float]], distance: str) -> DissimilarityRanking:
        return rank(matrix, model_id=self._loaded.description["id"], distance=distance)
