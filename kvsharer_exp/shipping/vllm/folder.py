"""What the folder of an export says that a server of it needs to know, without loading weights.

The command ``serve`` reads it before anything is started.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvsharer_exp.model.load import quiet_transformers
from kvsharer_exp.shipping.export import plan_file
from kvsharer_exp.shipping.stored import read_plan, stock_config
from kvsharer_exp.shipping.vllm.blocks import (
    BlockCheck,
    PredictedBlocks,
    page_bytes,
    predicted_blocks,
)
from kvsharer_exp.shipping.vllm.client import CacheReport
from kvsharer_exp.shipping.vllm.translate import engine_plan
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.text import clip, shorten

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes that an engine can serve, and the bytes of a number in each."""


@dataclass(frozen=True, slots=True)
class ExportFolder:
    """An export: its plan, and the shapes of its KV.

    ``windows`` has for every layer the sliding window of its attention, None for a full one.
    ``dtype`` is that of the weights, ``max_len`` the most tokens that the model can hold.
    """

    path: Path
    plan: KVPlan
    dtype: str
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    max_len: int

    @classmethod
    def read(cls, path: Path) -> ExportFolder:
        """Read the export at ``path``.

        Raises:
            InputError: it is no export, vLLM cannot run it, or the plan in its config.json is not
                the one that was exported.
        """
        plan, _ = read_plan(path)
        engine_plan(json.loads((path / "config.json").read_text(encoding="utf-8")))
        _check_unchanged(path, plan)
        try:
            config = stock_config(path).get_text_config(decoder=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{shorten(path)} cannot be read ({clip(str(error))}): export it again"
            ) from error
        heads = config.num_attention_heads
        return cls(
            path=path,
            plan=plan,
            dtype=str(config.dtype).removeprefix("torch."),
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            windows=_windows(config),
            max_len=config.max_position_embeddings,
        )

    def request_bytes(self, tokens: int, dtype: str) -> int:
        """The bytes of KV that one request of so many ``tokens`` needs at least."""
        held = sum(min(tokens, self.windows[layer] or tokens) for layer in self.plan.owners)
        return held * self._page_bytes(1, dtype)

    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    def check_blocks(
        self, report: CacheReport, *, memory_bytes: int, dtype: str, request_tokens: int
    ) -> BlockCheck:
        """Lay the engine's ``report`` beside what is predicted for ``memory_bytes`` of KV."""

        def predicted(owners: Iterable[int]) -> PredictedBlocks:
            return predicted_blocks(
                [self.windows[layer] for layer in owners],
                memory_bytes=memory_bytes,
                block_size=report.block_size,
                page_bytes=self._page_bytes(report.block_size, dtype),
            )

        return BlockCheck(
            reported=report.num_blocks,
            predicted=predicted(self.plan.owners),
            full=predicted(range(len(self.windows))),
            request_tokens=request_tokens,
        )

    def _page_bytes(self, block_size: int, dtype: str) -> int:
        return page_bytes(
            block_size=block_size,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            element_bytes=ELEMENT_BYTES[dtype],
        )


def _windows(config: Any) -> tuple[int | None, ...]:
    types = getattr(config, "layer_types", None)
    if types is None:  # one type, and its window makes no difference to the blocks
        return (None,) * config.num_hidden_layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)


def _check_unchanged(path: Path, plan: KVPlan) -> None:
    """Refuse an export whose config.json says another plan than the file that was written with it.

    An engine and `load_exported` both believe config.json. So a wrong source in it would change the
    answers of both in the same way, and no comparison of answers could tell.
    """
    name = plan_file(plan)
    if not (path / name).is_file():
        raise InputError(f"{shorten(path)} has no {name}: export it again")
    exported = KVPlan.parse(path / name)
    for layer, texts in enumerate(zip(plan.texts, exported.texts, strict=False)):
        if texts[0] != texts[1]:
            raise InputError(
                f"layer {layer} is {clip(texts[0], 12)} in config.json of {shorten(path, 45)}, "
                f"but was exported as {clip(texts[1], 12)}, see {name}: export it again"
            )
    if plan != exported:
        raise InputError(
            f"{shorten(path)}: config.json and {name} differ in layers: export it again"
        )
