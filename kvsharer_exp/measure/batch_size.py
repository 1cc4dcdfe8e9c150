"""How much goes through the model at once, and what is done where memory does not suffice for it.

Everything that scores plans runs its forwards inside `BatchSize.run`: the `Evaluator` of trials and
finals, the held-out text, the tasks, and the first stage of several plans together. What is
measured before, layer means, block errors and the moments of fits, is `halving_batches`. So memory
that runs out makes batches smaller everywhere. What fails with a batch of one fails with its
reason.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")


class BatchSize:
    """The most windows, items or plans in one forward; it is halved whenever memory runs out.

    Args:
        size: the number to begin with, at least 1.
        name: the setting that it comes from.
    """

    def __init__(self, size: int, name: str = "scoring.batch_size") -> None:
        self.size, self._name = size, name

    @classmethod
    def of(cls, value: BatchSize | int) -> BatchSize:
        """``value``, which others may share, or a size of one's own."""
        return value if isinstance(value, BatchSize) else cls(value)

    def run(
        self, work: Callable[[int], _Result], drop: Callable[[], bool] = lambda: False
    ) -> _Result:
        """Return what ``work`` gives, called with the size: again for as long as memory runs out.

        Args:
            drop: drops what is kept only to save time, and says whether there was any. That is
                tried once before each smaller size.

        Raises:
            RuntimeError: memory ran out with a size of 1, or it is another fault.
        """
        dropped = False
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                dropped = not dropped and drop()
                if not dropped and not self._halve():
                    raise
            # Here nothing refers to the frames of the error any more, and to the tensors in them.
            gc.collect()
            torch.cuda.empty_cache()  # does nothing without CUDA

    def _halve(self) -> bool:
        """Halve the size; returns whether it was above 1."""
        if self.size == 1:
            return False
        self.size //= 2
        _log.warning("memory ran out: %s is %d from here on", self._name, self.size)
        return True


def halving_batches(work: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Have ``work`` done again with half its keyword argument ``batch_size``, see `BatchSize`."""
    default = cast(Any, work).__kwdefaults__["batch_size"]

    @wraps(work)
    def run(*args: _Given.args, **given: _Given.kwargs) -> _Result:
        size = BatchSize.of(cast(int, given.get("batch_size", default)))
        return size.run(lambda fewer: work(*args, **cast(Any, {**given, "batch_size": fewer})))

    return run


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether the error says that a device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
