"""Cut windows into the batches that an `Evaluator` runs, and find those of some of the windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def cut(windows: torch.Tensor, cuts: Sequence[int], size: int) -> tuple[torch.Tensor, ...]:
    """Cut ``windows`` (num_windows, window_tokens) into batches of at most ``size``.

    A batch also ends after each number of windows in ``cuts``.
    """
    ends = sorted({count for count in cuts if 0 < count < len(windows)})
    return tuple(batch for part in windows.tensor_split(ends) for batch in part.split(size))


def batches_in(windows: slice, batches: Sequence[torch.Tensor]) -> list[int]:
    """The numbers of those ``batches`` that hold ``windows``.

    Raises:
        ValueError: ``windows`` begin or end within a batch.
    """
    asked, found, begin = range(sum(map(len, batches)))[windows], [], 0
    for index, batch in enumerate(batches):
        if begin in asked:
            found.append(index)
        begin += len(batch)
    if sum(len(batches[index]) for index in found) != len(asked):
        raise ValueError(f"{windows} begins or ends within a batch: name its ends in cuts")
    return found
