"""Score a candidate map against the full cache, computing only the layers it changes.

The full model's outputs on the windows are computed once and kept. A candidate that agrees with a
map whose states are kept up to layer i starts from that map's hidden states (and keys and values)
at layer i: the layers before it return what they returned then. Only the arithmetic is skipped,
the model's own forward still runs, so the numbers are those of a plain evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from kvsharer_exp.records import CandidateScores
from kvsharer_exp.sharing.architectures import AttentionLayer, attention_layers, check_map
from kvsharer_exp.sharing.cache import KeyValue
from kvsharer_exp.sharing.runtime import install
from kvsharer_exp.sharing_map import SharingMap


@dataclass(slots=True)
class _States:
    """What one batch left behind under one map, by layer index."""

    outputs: dict[int, Any] = field(default_factory=dict)  # block outputs
    key_values: dict[int, KeyValue] = field(default_factory=dict)  # of owners


@dataclass(slots=True)
class _Base:
    """A map and its states, one per batch."""

    sharing_map: SharingMap
    states: list[_States]


@dataclass(slots=True)
class _Reference:
    """The full model on one batch: hidden (batch, tokens, hidden_size); once a KL is asked for the
    entropies (batch, tokens) of its next-token distributions and, if they fit, their probabilities
    (batch, tokens, vocabulary), float32."""

    hidden: torch.Tensor
    last_output: Any
    entropies: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None


class Evaluator:
    """Scores maps on fixed windows.

    Args:
        model: a causal language model in eval mode.
        windows: token ids (num_windows, window_tokens).
        batch_size: windows per forward.
        memory_budget: bytes for what is kept. Layer states that do not fit are not kept (every
            candidate then runs all layers); reference probabilities that do not fit are made
            again from the kept last layer.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        *,
        batch_size: int = 8,
        memory_budget: int = 2 << 30,
    ) -> None:
        self._model = cast(Any, model)
        self._layers = attention_layers(model)
        device = self._model.get_input_embeddings().weight.device
        self._batches: tuple[torch.Tensor, ...] = windows.to(device).split(batch_size)
        self.layers_run = 0  # counted block forwards, for tests and benchmarks
        self._keeps_states, self._keeps_probabilities = self._plan(windows.numel(), memory_budget)
        identity = SharingMap.identity(self.num_layers)
        self._full = _Base(identity, [_States() for _ in self._batches])
        self._references = [self._refer(index) for index in range(len(self._batches))]
        self._base = self._full

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_windows(self) -> int:
        return sum(len(batch) for batch in self._batches)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the layer states and reference probabilities held now, each tensor once."""
        kept = [r.probabilities for r in self._references if r.probabilities is not None]
        for states in (*self._full.states, *self._base.states):
            for output in states.outputs.values():
                kept.append(output[0] if isinstance(output, tuple) else output)
            for key_value in states.key_values.values():
                kept += key_value
        storages = (tensor.untyped_storage() for tensor in kept)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @cached_property
    def full_scores(self) -> CandidateScores:
        """The unshared model's, on all windows; computed at first use."""
        return self.score(self._full.sharing_map)

    def score(
        self,
        sharing_map: SharingMap,
        *,
        batches: slice = slice(None),
        logits: bool = True,
    ) -> CandidateScores:
        """Scores of ``sharing_map`` on the windows of ``batches`` (in batches, all by default).

        ``logits=False`` leaves the head out: cosine only.
        """
        return self._score(sharing_map, batches, logits, None)

    def advance(
        self, sharing_map: SharingMap, accept: Callable[[CandidateScores], bool]
    ) -> tuple[CandidateScores, bool]:
        """Score by cosine; when ``accept`` says yes, later candidates start from this map."""
        kept = [_States() for _ in self._batches] if self._keeps_states else None
        scores = self._score(sharing_map, slice(None), False, kept)
        accepted = accept(scores)
        if accepted and kept is not None:
            self._base = _Base(sharing_map, kept)
        return scores, accepted

    def reset(self) -> None:
        """Forget the map that `advance` moved to; start from the full model again."""
        self._base = self._full

    @torch.inference_mode()
    def _score(
        self,
        sharing_map: SharingMap,
        batches: slice,
        logits: bool,
        kept: list[_States] | None,
    ) -> CandidateScores:
        check_map(sharing_map, self._layers)
        base, first = self._nearest(sharing_map)
        scores = CandidateScores(())
        for index in range(len(self._batches))[batches]:
            keep = kept[index] if kept is not None else None
            start = base.states[index]
            hidden, raw = self._run(index, sharing_map, first, start, keep, logits)
            scores += self._compare(index, hidden, raw)
        return scores

    def _nearest(self, sharing_map: SharingMap) -> tuple[_Base, int]:
        """The kept map that agrees with this one longest, and the first layer to compute."""
        if not self._keeps_states:
            return self._full, 0

        def first_difference(base: _Base) -> int:
            pairs = zip(
                base.sharing_map.kv_source_layers, sharing_map.kv_source_layers, strict=True
            )
            return next((i for i, (a, b) in enumerate(pairs) if a != b), self.num_layers)

        best = max((self._full, self._base), key=first_difference)
        return best, first_difference(best)

    def _run(
        self,
        index: int,
        sharing_map: SharingMap,
        first: int,
        start: _States,
        keep: _States | None,
        logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward of one batch from layer ``first`` on; fills ``keep`` with its states."""
        self.layers_run += self.num_layers - first
        early = {layer: kv for layer, kv in start.key_values.items() if layer < first}
        with ExitStack() as stack:
            if first:
                stack.enter_context(_skip(self._layers[:first], start.outputs[first - 1]))
            shared = stack.enter_context(
                install(self._layers, sharing_map, shared=dict(early), keep=keep is not None)
            )
            if keep is not None:
                keep.outputs = {i: start.outputs[i] for i in range(first)}
                keep.key_values = shared
                stack.enter_context(_record(self._layers[first:], keep.outputs))
            hidden, raw = self._forward(self._batches[index], logits)
        return hidden, raw

    def _forward(
        self, tokens: torch.Tensor, logits: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        decoder = self._model.base_model
        if not logits:
            return decoder(tokens, use_cache=False).last_hidden_state, None
        seen: list[torch.Tensor] = []
        handle = decoder.register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state)
        )
        try:
            raw = self._model(tokens, use_cache=False).logits
        finally:
            handle.remove()
        return seen[0], raw

    @torch.inference_mode()
    def _refer(self, index: int) -> _Reference:
        states = _States()
        identity = self._full.sharing_map
        hidden, _ = self._run(index, identity, 0, _States(), states, False)
        if self._keeps_states:
            self._full.states[index] = states
        return _Reference(hidden, states.outputs[self.num_layers - 1])

    def _distributions(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's next-token probabilities and their entropies."""
        reference = self._references[index]
        probabilities = reference.probabilities
        if probabilities is None:
            with _skip(self._layers, reference.last_output):
                raw = self._forward(self._batches[index], True)[1]
            assert raw is not None
            probabilities = raw.float().softmax(-1)
            if self._keeps_probabilities:
                reference.probabilities = probabilities
        if reference.entropies is None:
            sums = [torch.special.entr(p).sum(-1) for p in probabilities]
            reference.entropies = torch.stack(sums)
        return probabilities, reference.entropies

    def _compare(
        self, index: int, hidden: torch.Tensor, raw: torch.Tensor | None
    ) -> CandidateScores:
        reference = self._references[index].hidden
        cosines = nn.functional.cosine_similarity(
            hidden.float().flatten(1), reference.float().flatten(1)
        ).tolist()
        if raw is None:
            return CandidateScores(tuple(cosines))
        kls, nlls = [], []
        # One window at a time: the vocabulary makes these the largest tensors here.
        for tokens, logits, p, entropy in zip(
            self._batches[index], raw, *self._distributions(index), strict=True
        ):
            q = logits.float().log_softmax(-1)
            kl = -entropy - torch.linalg.vecdot(p, q)
            kls.append(max(0.0, kl.mean(dtype=torch.float64).item()))
            nlls.append(-q[:-1].gather(-1, tokens[1:, None]).mean(dtype=torch.float64).item())
        return CandidateScores(tuple(cosines), tuple(kls), tuple(nlls))

    def _plan(self, num_tokens: int, budget: int) -> tuple[bool, bool]:
        """Which of layer states and reference probabilities fit the budget together."""
        config = self._model.config.get_text_config(decoder=True)
        element = self._model.dtype.itemsize
        per_token = sum(layer.kv_bytes_per_token for layer in self._layers)
        per_token += self.num_layers * config.hidden_size * element
        states = 2 * num_tokens * per_token  # the full model's and the advanced map's
        probabilities = num_tokens * config.vocab_size * 4
        keeps_states = states <= budget
        return keeps_states, probabilities + states * keeps_states <= budget


@contextmanager
def _skip(layers: tuple[AttentionLayer, ...], output: Any) -> Iterator[None]:
    """Inside, the blocks of ``layers`` return ``output`` without computing."""
    with ExitStack() as undo:
        for layer in layers:
            own = layer.block.__dict__.get("forward")  # accelerate's hooks put one there
            if own is None:
                undo.callback(layer.block.__dict__.pop, "forward")
            else:
                undo.callback(layer.block.__dict__.__setitem__, "forward", own)
            layer.block.__dict__["forward"] = lambda *args, **kwargs: output
        yield


@contextmanager
def _record(layers: tuple[AttentionLayer, ...], outputs: dict[int, Any]) -> Iterator[None]:
    """Inside, the blocks of ``layers`` leave what they return in ``outputs``, by layer index."""
    with ExitStack() as undo:
        for layer in layers:
            handle = layer.block.register_forward_hook(
                lambda module, args, output, index=layer.index: outputs.__setitem__(index, output)
            )
            undo.callback(handle.remove)
        yield
