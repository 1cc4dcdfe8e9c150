"""The scores of one candidate map, window by window, as `Evaluator` gives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from kvsharer_exp.values.record import Record
from kvsharer_exp.values.score_names import CALIBRATION_PERPLEXITY, COSINE, KL


@dataclass(frozen=True, slots=True)
class CandidateScores(Record):
    """One map compared with the full cache: one number per window. All windows are equally long.

    ``cosines``: the cosine of the flattened last hidden states, as in the acceptance test of the
    paper's authors. ``kls``: KL(full ‖ shared) of the next-token distributions, mean over tokens,
    in nats. ``nlls``: the negative log-likelihood of predicted tokens under the map, mean over
    tokens, in nats. ``kls`` and ``nlls`` are empty if no logits were asked for. ``a + b`` joins the
    windows of two evaluations, and ``a[2:8]`` takes some of them.
    """

    cosines: tuple[float, ...]
    kls: tuple[float, ...] = ()
    nlls: tuple[float, ...] = ()

    def __add__(self, other: CandidateScores) -> CandidateScores:
        return CandidateScores(
            self.cosines + other.cosines, self.kls + other.kls, self.nlls + other.nlls
        )

    def __getitem__(self, windows: slice) -> CandidateScores:
        """The scores of some ``windows``."""
        return CandidateScores(self.cosines[windows], self.kls[windows], self.nlls[windows])

    def named(self) -> dict[str, float]:
        """The means over the windows under their public names."""
        return {COSINE: self.cosine, KL: self.kl, CALIBRATION_PERPLEXITY: self.perplexity}

    @property
    def items(self) -> dict[str, list[float]]:
        """The values behind the `named` scores; behind a perplexity these are log-likelihoods."""
        nlls = [-nll for nll in self.nlls]
        return {COSINE: [*self.cosines], KL: [*self.kls], CALIBRATION_PERPLEXITY: nlls}

    @property
    def cosine(self) -> float:
        return fmean(self.cosines)

    @property
    def kl(self) -> float:
        return fmean(self.kls)

    @property
    def perplexity(self) -> float:
        return math.exp(fmean(self.nlls))


Accept = Callable[[CandidateScores, int], bool | None]
"""Says from the scores so far and the number of windows left whether to accept a map.

None means that it cannot tell yet.
"""
