"""The groups ``engine`` and ``serve``: the serving engine, and what ``serve`` runs in it.

`Config` holds both groups. The engine is vLLM, in a Python environment of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvsharer_exp.cli.config.text_keys import PATH
from kvsharer_exp.cli.config.texts import one_of
from kvsharer_exp.values.errors import InputError, at_least


@dataclass
class EngineConfig:
    """Which engine runs the model, where it is, and how it runs.

    Args:
        name: ``transformers`` or ``vllm``: what ``evaluate`` and ``bench`` run a plan in;
            ``engine=vllm`` sets it. Default: ``transformers``.
        python: the Python that has vLLM, as a path or a command. Default:
            ``$KVSHARER_ENGINE_PYTHON``, or the Python that runs this command.
        eager: whether the model runs without being compiled, which starts in less time. Default:
            false.
        start_minutes: how long a start may take, above 0. Default: 15.
    """

    name: str = "transformers"
    python: str | None = field(default=None, metadata=PATH)
    eager: bool = False
    start_minutes: float = 15.0

    def __post_init__(self) -> None:
        one_of("engine", self.name, ("transformers", "vllm"))
        if self.start_minutes <= 0:
            raise InputError(f"engine.start_minutes={self.start_minutes:g}: give minutes above 0")


@dataclass
class ServeConfig:
    """What ``serve`` serves, and what it checks.

    With ``engine=vllm`` the command ``evaluate`` reads ``kv_gib`` and ``max_len`` too, and
    ``bench`` reads ``kv_gib``.

    Args:
        folder: the folder of an export. It has no default.
        port: the port on this machine, from 1 to 65535. Default: 8000.
        name: the name of the model in requests. Default: that of the export.
        kv_gib: GiB for the KV cache, above 0. Default: 1. null leaves it to the engine.
        max_len: the most tokens of a request, prompt and answer. Default: what the model can hold.
        dtype: ``float32``, ``bfloat16`` or ``float16``. Default: that of the export.
        check: whether the engine's answers are compared with those of `load_exported`, and its KV
            blocks with the prediction, after which the server ends; ``--check`` does the same.
            Default: false.
        prompts: for the check: the number of prompts, cut from ``heldout.path``, at least 1.
            Default: 8.
        prompt_tokens: for the check: the tokens of the longest prompt, at least 2. Default: 32.
        new_tokens: for the check: the tokens of every answer, at least 1. Default: 64.
    """

    folder: str | None = field(default=None, metadata=PATH)
    port: int = 8000
    name: str | None = None
    kv_gib: float | None = 1.0
    max_len: int | None = None
    dtype: str | None = None
    check: bool = False
    prompts: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise InputError(f"serve.port={self.port}: give a port in 1..65535")
        if self.kv_gib is not None and self.kv_gib <= 0:
            raise InputError(f"serve.kv_gib={self.kv_gib:g}: give GiB above 0, or null")
        if self.dtype is not None:
            one_of("serve.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        at_least("serve.prompts", self.prompts, 1)
        at_least("serve.prompt_tokens", self.prompt_tokens, 2)
        at_least("serve.new_tokens", self.new_tokens, 1)
        if self.max_len is None:
            return
        at_least("serve.max_len", self.max_len, 1)
        needed = self.prompt_tokens + self.new_tokens
        if self.check and self.max_len < needed:
            raise InputError(
                f"serve.max_len={self.max_len} is below the {needed} tokens of a check: raise it, "
                "or lower serve.prompt_tokens or serve.new_tokens"
            )
