"""Scores of one candidate map, window by window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from kvsharer_exp.values.record import Record
from kvsharer_exp.values.score_names import CALIBRATION_PERPLEXITY, COSINE, KL


@dataclass(frozen=True, slots=True)
class CandidateScores(Record):
    """One map against the full cache, one number per window (all windows have equal length).

    ``cosines``: of the flattened last hidden states, as in the authors' acceptance test.
    ``kls``: mean over tokens of KL(full ‖ shared) of the next-token distributions, nats.
    ``nlls``: mean over predicted tokens, nats. The last two are empty when no logits were asked
    for. ``a + b`` joins the windows of two evaluations, ``a[2:8]`` takes some.
    """

    cosines: tuple[float, ...]
    kls: tuple[float, ...] = ()
    nlls: tuple[float, ...] = ()

    def __add__(self, other: CandidateScores) -> CandidateScores:
        return CandidateScores(
            self.cosines + other.cosines, self.kls + other.kls, self.nlls + other.nlls
        )

    def __getitem__(self, windows: slice) -> CandidateScores:
        """Those of some ``windows``."""
        return CandidateScores(self.cosines[windows], self.kls[windows], self.nlls[windows])

    def named(self) -> dict[str, float]:
        """The means over the windows under their public names."""
        return {COSINE: self.cosine, KL: self.kl, CALIBRATION_PERPLEXITY: self.perplexity}

    @property
    def cosine(self) -> float:
        return fmean(self.cosines)

    @property
    def kl(self) -> float:
        return fmean(self.kls)

    @property
    def perplexity(self) -> float:
        return math.exp(fmean(self.nlls))
