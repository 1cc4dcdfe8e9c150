"""Score a candidate plan against the full cache, computing only the layers that the map changes.

Searches and ablations score their maps with an `Evaluator`. The full model's outputs on a batch of
windows are computed when first needed, and kept. A candidate starts from the hidden states, keys
and values of the longest prefix that it has in common with a map scored before (`prefix_states`).
The layers of that prefix return what they returned then. The model's own forward still runs, and
only the arithmetic is skipped, so the numbers are those of a plain evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

from kvsharer_exp.measure.batch_size import BatchSize
from kvsharer_exp.measure.blocks import forward, num_bytes, part_of, recorded, repeated, skipped
from kvsharer_exp.measure.memory_plan import plan_memory
from kvsharer_exp.measure.overflow import overflow
from kvsharer_exp.measure.prefix_states import LayerState, PrefixStates, kept_by, layers_in_common
from kvsharer_exp.measure.reference import Reference
from kvsharer_exp.measure.window_batches import batches_in, cut
from kvsharer_exp.measure.window_scores import cosines, first_not_finite, losses
from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.exchange import Handed
from kvsharer_exp.model.sharing.runtime import install
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.scores import Accept, CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap

AnyPlan = FittedPlan | KVPlan | SharingMap
_Result = TypeVar("_Result")


class Evaluator:
    """Scores candidate maps on fixed windows.

    Args:
        model: a causal language model in eval mode.
        windows: token ids (num_windows, window_tokens).
        batch_size: the most windows of each map per forward; fewer after memory has run out.
        cuts: numbers of windows after which a batch ends, so that `score` can stop there.
        memory_budget: bytes for what is kept. Reference probabilities have at most half of them.
            Those of batches that do not fit are made again from the last layer's output, which is
            kept. Layer states have the rest. The least recently used are dropped. If the states of
            two maps do not fit, only those of the first layers are kept.
        prompt: how many first tokens of each window are a prompt, at whose end some keeps choose.
            Only what the tokens after it predict is scored. None: no prompt, all is scored.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        *,
        batch_size: BatchSize | int = 8,
        cuts: Sequence[int] = (),
        memory_budget: int = 4 << 30,
        prompt: int | None = None,
    ) -> None:
        self._model = cast(Any, model)
        self._layers = attention_layers(model)
        self._full = FittedPlan(KVPlan.full(self.num_layers))
        self._prompt, self._first = prompt, prompt or 0  # the first token that is scored
        self._windows, self._cuts = windows.to(input_device(model)), cuts
        self._budget, self._batch_size = memory_budget, BatchSize.of(batch_size)
        self.layers_run = 0  # counted block forwards, for tests and benchmarks
        self._cut(self._batch_size.size)

    def _cut(self, size: int) -> None:
        """Cut the windows into batches of at most ``size``; what was kept of others is dropped."""
        self._size, self._batches = size, cut(self._windows, self._cuts, size)
        plan = plan_memory(self._model, self._layers, self._batches, self._budget, self._first)
        self._kept_probabilities, self._kept_layers = plan.probability_batches, plan.state_layers
        bytes_each = [plan.state_bytes * len(b) // self.num_windows for b in self._batches]
        self._states = list(map(PrefixStates, bytes_each))
        self._references: dict[int, Reference] = {}  # made when their batch is first scored

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the layer states and reference probabilities held now."""
        references = self._references.values()
        kept = [r.probabilities for r in references if r.probabilities is not None]
        return num_bytes(kept) + sum(states.nbytes for states in self._states)

    @cached_property
    def full_scores(self) -> CandidateScores:
        """The full model's scores on all windows, computed at first use."""
        return self.score(self._full)

    @torch.inference_mode()
    def score(
        self,
        plan: AnyPlan,
        *,
        windows: slice = slice(None),
        logits: bool = True,
    ) -> CandidateScores:
        """Score ``plan`` on ``windows``, all by default.

        ``logits=False`` leaves the head out, so that only the cosine is measured.

        Raises:
            ValueError: ``windows`` begin or end within a batch.
            InputError: the plan does not fit the model, or has stand-ins without fits.
            NotFiniteError: a score is not finite; names the window, and the layer where it began.
        """
        return self._fitting(lambda: self._score_all([plan], windows, logits))[0]

    def _fitting(self, score: Callable[[], _Result]) -> _Result:
        """What ``score`` gives, where batches get smaller if memory runs out (`BatchSize.run`)."""

        def sized(size: int) -> _Result:
            if size != self._size:
                self._cut(size)
            return score()

        return self._batch_size.run(sized, self.reset)

    @torch.inference_mode()
    def score_together(
        self,
        plans: Sequence[AnyPlan],
        *,
        windows: slice = slice(None),
        logits: bool = True,
    ) -> list[CandidateScores]:
        """`score` each of ``plans``, all in one forward per batch of windows.

        The forward starts after the first layers that all plans have in common and whose states are
        kept. This pays where one plan alone leaves the device idle. Memory that runs out is an
        error here, for fewer plans may fit.
        """
        return self._score_all(plans, windows, logits)

    def _score_all(
        self, plans: Sequence[AnyPlan], windows: slice, logits: bool
    ) -> list[CandidateScores]:
        fitted = [self._fitted(plan) for plan in plans]
        scores = [CandidateScores(())] * len(plans)
        for index in batches_in(windows, self._batches):
            for number, (more, states) in enumerate(self._score(index, fitted, logits)):
                self._states[index].keep(fitted[number], states)
                scores[number] += more
        return scores

    def _fitted(self, plan: AnyPlan) -> FittedPlan:
        fitted = FittedPlan.of(plan)
        check_plan(fitted, self._layers)
        return fitted

    @torch.inference_mode()
    def advance(self, plan: AnyPlan, accept: Accept) -> tuple[CandidateScores, bool]:
        """Score by cosine, batch by batch, until ``accept`` decides.

        Returns the scores so far and whether the plan is accepted. The states of the plan are kept
        only if it is.
        """
        return self._fitting(lambda: self._advance(self._fitted(plan), accept))

    def _advance(self, fitted: FittedPlan, accept: Accept) -> tuple[CandidateScores, bool]:
        scores, kept, accepted = CandidateScores(()), [], None
        for index in range(len(self._batches)):
            ((more, states),) = self._score(index, [fitted], False)
            scores += more
            kept.append(states)
            accepted = accept(scores, self.num_windows - len(scores.cosines))
            if accepted is not None:
                break
        if accepted:
            for known, states in zip(self._states, kept, strict=False):
                known.keep(fitted, states)
        return scores, bool(accepted)

    def reset(self) -> bool:
        """Drop the states of all maps except the full one; returns whether there were any."""
        return any([states.forget_all_but(self._full) for states in self._states])

    def _score(
        self, index: int, plans: Sequence[FittedPlan], logits: bool
    ) -> list[tuple[CandidateScores, list[LayerState]]]:
        """For each plan, its scores on one batch and the states to keep."""
        self._refer(index)  # first, because candidates start from its states
        scored = []
        for number, (hidden, raw, states) in enumerate(self._run(index, plans, logits)):
            scored.append((self._compare(index, hidden, raw), states))
            row = first_not_finite(scored[-1][0])
            if row is not None:  # nothing may be compared with that
                raise self._overflow(index, row, plans[number])
        return scored

    def _overflow(self, index: int, row: int, plan: FittedPlan) -> NotFiniteError:
        """The error for one window of a batch, which is not finite under ``plan``."""
        before = sum(len(batch) for batch in self._batches[:index])
        with install(self._layers, [plan], prompt=self._prompt):
            return overflow(self._model, self._layers, self._batches[index][row], before + row)

    def _run(
        self, index: int, plans: Sequence[FittedPlan], logits: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor | None, list[LayerState]]]:
        """Run one batch once for each plan, from the first layer on whose state is not kept or is
        not the same for all plans. Returns hidden states, logits and states to keep, by plan."""
        start = self._states[index].longest(plans[0])[: layers_in_common(plans)]
        first, new = len(start), self._layers[len(start) : self._kept_layers]
        self.layers_run += len(plans) * (self.num_layers - first)
        read = {s for p in plans for s in (*p.plan.key_sources, *p.plan.value_sources)[first:]}
        handed: Handed = {
            i: {None: repeated(state.key_value, len(plans))}
            for i, state in enumerate(start)
            if state.key_value is not None and i in read
        }
        outputs: dict[int, Any] = {}
        with ExitStack() as stack:
            if start:
                before = repeated(start[-1].output, len(plans))
                stack.enter_context(skipped(self._layers[:first], before))
            installed = install(
                self._layers, plans, handed=handed, keep=bool(new), prompt=self._prompt
            )
            stack.enter_context(installed)
            stack.enter_context(recorded(new, outputs))
            tokens = self._batches[index].repeat(len(plans), 1)
            hidden, raw = forward(self._model, tokens, logits, self._first)
        runs = []
        for part, plan in enumerate(plans):
            mine = partial(part_of, part=part, parts=len(plans))
            states = [
                LayerState(
                    mine(outputs[layer.index]),
                    kept_by(plan, layer.index, handed, (part, len(plans))),
                )
                for layer in new
            ]
            runs.append((mine(hidden), mine(raw), [*start, *states]))
        return runs

    def _refer(self, index: int) -> Reference:
        """The full model's outputs on one batch, computed at the first call."""
        if index not in self._references:
            last: dict[int, Any] = {}
            with recorded(self._layers[-1:], last):
                ((hidden, _, states),) = self._run(index, [self._full], False)
            finite = hidden.flatten(1).isfinite().all(1)
            if not finite.all():  # no map can be compared with that
                row = int((~finite).nonzero()[0])
                error = self._overflow(index, row, self._full)
                raise InputError(f"the full cache gives {error}") from error
            self._states[index].keep(self._full, states)
            self._references[index] = Reference(hidden, last[self.num_layers - 1])
        return self._references[index]

    def _distributions(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's next-token probabilities and their entropies."""
        reference = self._refer(index)
        probabilities = reference.probabilities
        if probabilities is None:
            with skipped(self._layers, reference.last_output):
                raw = forward(self._model, self._batches[index], True, self._first)[1]
            assert raw is not None
            probabilities = raw.softmax(-1, dtype=torch.float32)
            if index < self._kept_probabilities:
                reference.probabilities = probabilities
        if reference.entropies is None:
            sums = [torch.special.entr(p).sum(-1) for p in probabilities]
            reference.entropies = torch.stack(sums)
        return probabilities, reference.entropies

    def _compare(
        self, index: int, hidden: torch.Tensor, raw: torch.Tensor | None
    ) -> CandidateScores:
        near = cosines(hidden, self._refer(index).hidden)
        if raw is None:
            return CandidateScores(near)
        tokens = self._batches[index][:, self._first :]
        return CandidateScores(near, *losses(tokens, raw, *self._distributions(index)))
