"""Measure the speed and memory of a plan beside the full cache, on the model's own loop.

The commands ``bench`` and ``ablate`` call `measure`. `prediction` says what the shapes alone
predict.

The loop is what ``generate`` does for a greedy answer: one prefill, then one forward per token on
the `DynamicCache` that the model makes by itself. Full and shared take turns, after a warm-up.
"""

from __future__ import annotations

import gc
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from kvsharer_exp.measure.allocations import allocation_peak
from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import max_positions, text_config
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

_WARM_UP_STEPS = 3


def check_length(model: nn.Module, num_tokens: int, what: str) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        InputError: there are more; the message names ``what``, the number and the limit.
    """
    limit = max_positions(model)
    if limit is not None and num_tokens > limit:
        raise InputError(
            f"{what} is {num_tokens} tokens, but the model has max_position_embeddings={limit}: "
            "give fewer"
        )


def measure(
    model: nn.Module,
    plan: FittedPlan | KVPlan | SharingMap,
    *,
    batch: int,
    context: int,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the full cache and the plan in turn, prefill by prefill and step by step.

    Both start from the same random tokens: ``batch`` sequences of ``context`` tokens. The decode
    rate of a round is that of its median step, so that a pause of the machine does not count.
    ``speedup`` is a ratio of medians over the ``repeats`` rounds, above 1 where shared is faster.
    ``kv_projection_calls`` is how often the key and value projections that the plan does without
    ran in one warm-up, counted by hooks. ``prefill_peak_bytes`` is the most memory that the prefill
    of the warm-up had allocated at once, the cache that it fills among it. ``decode_peak_bytes`` is
    the most that one of its steps had allocated at once beside what was there before: what is
    written out of a quantised cache, and copies of the cache.
    """
    fitted = FittedPlan.of(plan)
    vocabulary = text_config(model).vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch, context), generator=generator)
    ids = ids.to(input_device(model))
    sides: dict[str, Callable[[], Any]] = {
        "full": nullcontext,
        "shared": lambda: apply_plan(model, fitted),
    }
    with counted_projections(model, fitted.plan) as ran:
        warm_up = _round(model, ids, sides, _WARM_UP_STEPS, ran)
    turns = (sides, dict(reversed(sides.items())))  # neither is always the second
    rounds = [_round(model, ids, turns[i % 2], new_tokens) for i in range(repeats)]
    sums = {side: _summary([one[side] for one in rounds]) for side in sides}
    for side in sides:
        for counted in ("kv_projection_calls", "prefill_peak_bytes", "decode_peak_bytes"):
            sums[side][counted] = warm_up[side][counted]
    full, shared = sums["full"], sums["shared"]
    prefill, decode = "prefill_seconds", "decode_tokens_per_second"
    speedup = {
        "prefill": full[prefill]["median"] / shared[prefill]["median"],
        "decode": shared[decode]["median"] / full[decode]["median"],
    }
    return {"new_tokens": new_tokens, "repeats": repeats, **sums, "speedup": speedup}


@contextmanager
def counted_projections(model: nn.Module, plan: KVPlan | SharingMap) -> Iterator[list[str]]:
    """Yield a list that grows by a name whenever a K/V projection runs that ``plan`` does without.

    These are the projections of halves that are read elsewhere, and those of attentions that
    stand-ins replace. A fused projection counts if neither half is the layer's own.
    """
    handles, plan = [], KVPlan.of(plan)
    seen: list[str] = []
    for layer in attention_layers(model):
        halves = {"k_proj": plan.key_sources, "v_proj": plan.value_sources}
        names = [name for name, half in halves.items() if half[layer.index] != layer.index]
        fused = getattr(layer.projections, "name", None)
        if fused is not None:
            names = [fused] if len(names) == 2 else []
        for name in names:
            handles.append(
                layer.projection(name).register_forward_hook(
                    lambda *_, name=f"{layer.index}.{name}": seen.append(name)
                )
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _round(
    model: nn.Module,
    prompt: torch.Tensor,
    sides: Mapping[str, Callable[[], Any]],
    new_tokens: int,
    ran: list[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a prefill of ``prompt`` (batch, context) on each side, then greedy steps in turn.

    There are ``new_tokens`` steps, and each side has its own cache. Memory is measured after the
    prefill. On CUDA it is the peak of the prefill, without what the other side holds. On the CPU it
    is the memory of the whole process. With ``ran`` the peak of every forward is counted too.
    """
    # Like `generate`, compute the logits of the last position only.
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if keep else {}
    cuda = prompt.is_cuda
    gc.collect()
    start = torch.cuda.memory_allocated(prompt.device) if cuda else 0
    ids, caches = dict.fromkeys(sides, prompt), dict.fromkeys(sides)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, dict[str, int]] = {}
    calls = dict.fromkeys(sides, 0)
    for step in range(new_tokens + 1):
        for side, way in sides.items():
            counts = ran is not None or (step == 0 and cuda)
            peak: AbstractContextManager[list[int]] = (
                allocation_peak(prompt.device) if counts else nullcontext([])
            )
            with peak as peaks, way():
                started = _now(cuda)
                output = model(ids[side], past_key_values=caches[side], use_cache=True, **last)
                ids[side] = output.logits[:, -1:].argmax(-1)
                seconds[side].append(_now(cuda) - started)
            caches[side] = output.past_key_values
            if ran is not None:
                calls[side] += len(ran)
                ran.clear()
            if step == 0 and cuda:
                memory[side] = {"peak_memory_bytes": start + peaks[0]}
            elif step == 0:
                memory[side] = {"resident_bytes": _resident_bytes()}
            if ran is not None:
                phase = "decode_peak_bytes" if step else "prefill_peak_bytes"
                memory[side][phase] = max(memory[side].get(phase, 0), peaks[0])
            del output
    return {
        side: {
            "prefill_seconds": seconds[side][0],
            "decode_tokens_per_second": len(prompt) / median(seconds[side][1:]),
            "cache_bytes": cache_bytes(caches[side]),
            "kv_projection_calls": calls[side],
            **memory[side],
        }
        for side in sides
    }


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where there is no ``/proc``.

    It holds the weights, both caches, and freed memory that malloc keeps.
    """
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of each value that varies between runs."""

    def spread(key: str) -> dict[str, float]:
        values = [run[key] for run in runs]
        return {"median": median(values), "min": min(values), "max": max(values)}

    counted = ("cache_bytes", "kv_projection_calls")
    whole = {key: spread(key) for key in runs[0] if key not in counted}
    return {**whole, "cache_bytes": runs[0]["cache_bytes"]}
