"""The texts of a command, and the token windows that are cut from them.

Every command that loads a model is given `Windows`. Calibration windows rank the layers and decide
the acceptance test. Scoring windows are what the search optimises on. The finals use what is left
of the calibration text. Stand-ins are fitted on the fit windows, which are from all over that text.
Held-out windows are cut from the report part, which no search sees.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.data.recall_windows import plant_facts
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.windows import RememberingTokenizer, token_windows
from kvsharer_exp.values.errors import InputError

_RUN = 16  # windows that have so many tokens in a row in common are taken to overlap


class Windows:
    """The windows of a command as token ids, (num_windows, window_tokens), cut when first read."""

    def __init__(self, config: Config, loaded: LoadedModel) -> None:
        self._config, self._loaded = config, loaded

    @cached_property
    def texts(self) -> TextParts:
        """The calibration, search and report parts of the texts."""
        return split_texts(self._config.calibration.path, self._config.heldout.path)

    @cached_property
    def calibration(self) -> torch.Tensor:
        wanted = self._config.calibration
        return self._cut(self.texts.calibration, wanted.num_windows, wanted.window_tokens)

    @cached_property
    def held_out(self) -> torch.Tensor:
        wanted = self._config.heldout
        return self._cut(self.texts.report, wanted.num_windows, wanted.window_tokens)

    @cached_property
    def scoring(self) -> torch.Tensor:
        """At most ``scoring.num_windows`` windows: fewer, even none, if the text gives no more.

        Raises:
            InputError: there is none, and windows are to begin with a prompt.
        """
        wanted = self._config.scoring
        found = self._scoring(wanted.num_windows)
        if not len(found) and wanted.prompt_tokens is not None:
            raise InputError(
                f"the calibration text has no window of scoring.window_tokens="
                f"{wanted.window_tokens}: give longer documents, or shorter prompts and windows"
            )
        return found

    @property
    def fitness(self) -> torch.Tensor:
        """What maps are scored on: `scoring`, and where the text has none, `calibration`."""
        return self.scoring if len(self.scoring) else self.calibration

    @cached_property
    def finals(self) -> torch.Tensor:
        """The windows after the scoring windows in the calibration text.

        There are as many as ``study.final_windows`` asks for, or fewer if the text gives no more.
        """
        study, scoring = self._config.study, self._config.scoring
        wanted = study.final_windows
        if wanted is None:
            wanted = sys.maxsize if study.minutes is not None else 0
        return self._scoring(scoring.num_windows + wanted)[scoring.num_windows :]

    @cached_property
    def fit(self) -> torch.Tensor:
        """Windows from all over the calibration text that hold no text of the scoring windows.

        There are ``fit.num_windows``, or fewer if the text gives no more. The finals' windows hold
        text of them: score plans with stand-ins on what `beside_fits` leaves.
        """
        wanted = self._config.fit
        tokens = wanted.window_tokens
        cut = self._cut(self.texts.calibration, sys.maxsize, tokens, at_most=True)
        left = without_runs_of(cut, self.scoring)
        count = min(wanted.num_windows, len(left))
        return left[[index * len(left) // count for index in range(count)]]

    def beside_fits(self, windows: torch.Tensor) -> torch.Tensor:
        """Those of ``windows`` that hold no text of the `fit` windows."""
        return without_runs_of(windows, self.fit)

    def require(self, *kinds: Literal["calibration", "scoring", "fitness", "held_out"]) -> None:
        """Cut these windows now, so that too little text is refused before model time is spent.

        Raises:
            InputError: the text gives too few windows, or the parts of the text overlap.
        """
        for kind in kinds:
            getattr(self, kind)

    def _scoring(self, at_most: int) -> torch.Tensor:
        wanted = self._config.scoring
        cut = self._cut(self.texts.calibration, at_most, wanted.window_tokens, at_most=True)
        if not wanted.recall or wanted.prompt_tokens is None:
            return cut
        return plant_facts(
            cut,
            self._loaded.tokenizer,
            prompt_tokens=wanted.prompt_tokens,
            seed=self._config.seed,
        )

    @cached_property
    def _tokenizer(self) -> RememberingTokenizer:
        return RememberingTokenizer(self._loaded.tokenizer)

    def _cut(
        self, passages: Sequence[Any], num_windows: int, tokens: int, *, at_most: bool = False
    ) -> torch.Tensor:
        return token_windows(
            passages,
            self._tokenizer,
            num_windows=num_windows,
            window_tokens=tokens,
            at_most=at_most,
            seed=self._config.seed,
            add_bos=self._loaded.adds_bos,
        )


def without_runs_of(windows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Those of ``windows`` that have no 16 tokens in a row in common with one of ``others``.

    Both are token ids, (num_windows, window_tokens). Shorter windows are compared whole.
    """
    if not len(windows) or not len(others):
        return windows
    length = min(_RUN, windows.shape[1], others.shape[1])
    seen = {tuple(run) for window in others for run in window.unfold(0, length, 1).tolist()}
    kept = [
        index
        for index, window in enumerate(windows)
        if seen.isdisjoint(map(tuple, window.unfold(0, length, 1).tolist()))
    ]
    return windows[kept]
