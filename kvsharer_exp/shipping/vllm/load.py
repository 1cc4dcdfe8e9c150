"""Put a load on a server, and measure how it is carried: ``kvsharer bench engine=vllm``.

A load is a number of requests that are sent at once. Those whose KV finds no room wait in the
engine, or are preempted and computed again, as in production.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvsharer_exp.shipping.vllm.blocks import PredictedBlocks
from kvsharer_exp.shipping.vllm.client import CacheReport, Client, EngineError

_TOKEN_SECONDS = "vllm:request_time_per_output_token_seconds"
_PREEMPTIONS = "vllm:num_preemptions_total"
_SAMPLE = re.compile(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)
_WAIT_SECONDS = 10.0  # the engine counts a request a moment after it has answered it


@dataclass(frozen=True, slots=True)
class Burst:
    """How one load was carried.

    Args:
        tokens_per_second: new tokens of all requests over the time until the last is answered.
        token_seconds: the mean over the requests of the time between two tokens, as the engine
            counts it.
        preemptions: how often the engine took a running request's KV away.
    """

    tokens_per_second: float
    token_seconds: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class LoadClient(Client):
    """A `Client` that measures."""

    def burst(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Burst:
        """Send all ``prompts`` at once, and continue each by ``new_tokens`` tokens, at least two.

        Raises:
            EngineError: the server refuses a request, fails, or does not count its requests.
        """
        before = self._counters()
        started = time.perf_counter()
        self.complete_all(prompts, new_tokens, at_once=len(prompts))
        seconds = time.perf_counter() - started
        after = self._counters_after(before, len(prompts))
        spent = after[_TOKEN_SECONDS + "_sum"] - before[_TOKEN_SECONDS + "_sum"]
        return Burst(
            tokens_per_second=len(prompts) * new_tokens / seconds,
            token_seconds=spent / len(prompts),
            preemptions=round(after[_PREEMPTIONS] - before[_PREEMPTIONS]),
        )

    def _counters_after(self, before: Mapping[str, float], requests: int) -> Counter[str]:
        deadline = time.monotonic() + _WAIT_SECONDS
        count = _TOKEN_SECONDS + "_count"
        while (found := self._counters())[count] - before[count] < requests:
            if time.monotonic() > deadline:
                counted = round(found[count] - before[count])
                raise EngineError(f"the engine counts {counted} of {requests} requests")
            time.sleep(0.02)
        return found

    def _counters(self) -> Counter[str]:
        """Every metric of the engine by name, summed over its labels; 0 for one that is not there.

        The engine makes some of them with the first request.
        """
        counters: Counter[str] = Counter()
        for name, value in _SAMPLE.findall(self._open(f"{self.address}/metrics").decode()):
            counters[name] += float(value)  # type: ignore[assignment]
        return counters


def requests_that_fit(report: CacheReport, predicted: PredictedBlocks, tokens: int) -> int:
    """How many requests of ``tokens`` tokens have room for their KV in the reported blocks.

    vLLM keeps one block for itself.
    """
    blocks = predicted.request_bytes(tokens) // predicted.bytes_per_block
    return (report.num_blocks - 1) // blocks
