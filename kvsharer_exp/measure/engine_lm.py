"""lm-eval's view of a model that runs elsewhere: an engine is asked for every log-likelihood.

`TaskScorer` makes an `EngineLM` if it is given somebody to ask. It cuts texts into tokens exactly
as for the model in this process, so that both are asked for the same tokens after the same tokens.
lm-eval's own ``local-completions`` tokenizes and truncates in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from kvsharer_exp.values.agreement import Likelihoods


class EngineLM(HFLM):
    """lm-eval's `HFLM` with the forward of its model left to ``ask``.

    The model is not run. lm-eval looks up its configuration and its vocabulary.
    """

    def __init__(self, ask: Likelihoods, **options: Any) -> None:
        super().__init__(**options)
        self._ask = ask

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Answer ``requests`` in their order; contexts lose their beginning where HFLM cuts it."""
        room = self.max_length + 1  # the last token is predicted and not read
        return self._ask(
            [
                (context[-(room - len(continuation)) :], continuation)
                for _, context, continuation in requests
            ]
        )
