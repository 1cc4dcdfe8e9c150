"""Ask a server how likely given tokens are, for lm-eval's tasks.

`kvsharer evaluate engine=vllm` scores a plan with it. Tokens are sent as ids, as in `client`. vLLM
computes the log-likelihoods of a prompt anew, without its prefix cache, and adds one token that
nobody needs. So a request is one token longer than what it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvsharer_exp.shipping.vllm.client import Client, EngineError

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class LikelihoodClient(Client):
    """A `Client` that asks for log-likelihoods."""

    def log_likelihood(self, context: Tokens, continuation: Tokens) -> tuple[float, bool]:
        """The log-likelihood of ``continuation`` after ``context`` in nats, and if it is greedy.

        It is greedy if no other token is more likely at any of its places.

        Raises:
            EngineError: the server refuses the request, fails, or does not answer.
        """
        tokens = [*context, *continuation]
        answer = self._post(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": tokens,
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 1,
            },
        )
        told = answer["choices"][0]["prompt_logprobs"]
        if told is None or len(told) != len(tokens):
            raise EngineError("the engine gives no log-likelihoods of a prompt")
        total, greedy = 0.0, True
        for token, place in list(zip(tokens, told, strict=True))[len(context) :]:
            own = place[str(token)]["logprob"]
            total += own
            greedy &= own >= max(other["logprob"] for other in place.values())
        return total, greedy

    def log_likelihoods(
        self, requests: Sequence[tuple[Tokens, Tokens]], *, at_once: int
    ) -> list[tuple[float, bool]]:
        """Answer all ``requests``, (context, continuation) pairs, ``at_once`` of them in flight."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda request: self.log_likelihood(*request), requests))
