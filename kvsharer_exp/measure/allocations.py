"""Count how much memory some forwards have allocated at once; `benchmark` asks it.

The memory of a process does not tell: it holds what malloc keeps, and the peak of an earlier run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allocation_peak(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds, after the block, the most bytes of tensors allocated in it at once.

    What was there before does not count. On the CPU torch's profiler tells every allocation, so
    the block is slower than it would be.
    """
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield found
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    found.append(peak)
