"""The model of a command. It is loaded when a command, or another part, first reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.describe import adds_bos, describe
from kvsharer_exp.model.footprint import max_positions
from kvsharer_exp.model.load import load
from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap


class LoadedModel:
    """The model, its tokenizer, and what is known of both."""

    def __init__(self, config: Config, log: RunLog) -> None:
        self._say, self._context = log.say, config.footprint.context
        self.name = config.model.name
        self.spec = ModelSpec(**asdict(config.model))

    @cached_property
    def _loaded(self) -> tuple[Any, Any, tuple[AttentionLayer, ...]]:
        self._say(f"loading {self.spec.name} ({self.spec.source})")
        model, tokenizer = load(self.spec)
        # This refuses a model that cannot share, before anything is computed.
        return model, tokenizer, attention_layers(model)

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        return self._loaded[2]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def full_cache(self) -> SharingMap:
        """The map under which every layer keeps its own KV."""
        return SharingMap.identity(self.num_layers)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What identifies the weights, and the shapes that matter for the cache."""
        return describe(self.model, self.spec)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a text begins with the tokenizer's BOS."""
        return adds_bos(self.spec, self.tokenizer)

    def tell_contexts(self, contexts: Sequence[int] = ()) -> None:
        """Say in a line at which contexts bytes are counted that no text of the model reaches.

        They are ``contexts``, or if there are none, ``footprint.context``.
        """
        longest = max_positions(self.model)
        asked = contexts or [self._context]
        beyond = ", ".join(f"{n:,}" for n in asked if longest is not None and n > longest)
        if beyond:
            key = "ablate.contexts" if contexts else "footprint.context"
            self._say(
                f"{key}: {beyond} tokens are more than the {longest:,} positions of {self.name}; "
                "bytes there follow from the shapes, but no text is so long"
            )

    def check(self, plan: KVPlan | SharingMap) -> None:
        """Refuse a plan or a map that does not fit the model.

        Raises:
            SharingError: the number of layers differs, or a layer cannot do its action: a target
                and its source differ in KV shape or attention type, ….
        """
        check_plan(plan, self.layers)
