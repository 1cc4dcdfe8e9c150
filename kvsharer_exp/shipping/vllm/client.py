"""Ask a server for greedy answers to prompts, both as token ids, over its OpenAI interface.

`check` and whoever measures the server use it. Ids are sent and received, never text, so that no
tokenizer stands between the two runtimes that are compared.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from kvsharer_exp.values.text import clip

_INFO = "vllm:cache_config_info"
# The server is on this machine, so a proxy of the environment is not asked.
_open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class EngineError(RuntimeError):
    """The engine failed: it did not start, ended, or answered with an error."""


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the engine says of its KV cache.

    ``num_tokens`` is the capacity by vLLM's own count, for requests of the longest length.
    """

    num_blocks: int
    block_size: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Client:
    """Speaks with the server at ``address``, like ``http://127.0.0.1:8000``.

    Args:
        model: the name under which the server has the model.
        seconds: how long one answer may take.
    """

    address: str
    model: str
    seconds: float = 600.0

    def is_healthy(self) -> bool:
        """Whether the server is up and its engine runs."""
        try:
            with _open_url(f"{self.address}/health", timeout=5):
                return True
        except (OSError, HTTPException):  # the errors of urllib are OSErrors
            return False

    def complete(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Continue ``prompt`` greedily by exactly ``new_tokens`` tokens, past an end of text.

        Raises:
            EngineError: the server refuses the request, fails, or does not answer.
        """
        answer = self._post(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": list(prompt),
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        tokens: list[int] = answer["choices"][0]["token_ids"]
        if len(tokens) != new_tokens:
            raise EngineError(f"the engine gave {len(tokens)} of {new_tokens} tokens")
        return tokens

    def complete_all(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, *, at_once: int
    ) -> list[list[int]]:
        """Answer all ``prompts``, in their order, with ``at_once`` of them in flight."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, new_tokens), prompts))

    def cache_report(self) -> CacheReport:
        """Ask what KV cache the engine has made.

        Raises:
            EngineError: the server does not answer, or does not say it.
        """
        text = self._open(f"{self.address}/metrics").decode()
        line = next((line for line in text.splitlines() if line.startswith(_INFO)), "")
        said = dict(re.findall(r'(\w+)="([^"]*)"', line))
        try:
            return CacheReport(
                num_blocks=int(said["num_gpu_blocks"]),  # so called on a CPU too
                block_size=int(said["block_size"]),
                num_tokens=int(said["kv_cache_size_tokens"]),
            )
        except (KeyError, ValueError) as error:
            raise EngineError(f"the engine does not report its KV blocks ({error})") from error

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return json.loads(self._open(request))

    def _open(self, request: urllib.request.Request | str) -> bytes:
        try:
            with _open_url(request, timeout=self.seconds) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise EngineError(f"the engine refuses ({error.code}): {clip(said, 120)}") from error
        except (OSError, HTTPException) as error:
            raise EngineError(f"the engine does not answer: {error}") from error
