"""The groups ``fit`` and ``footprint``: how stand-ins are fitted, and where memory is compared.

`Config` holds both. `Plans` reads the first, and the commands that print bytes the second.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.errors import InputError, at_least


@dataclass
class FitConfig:
    """How the stand-ins of a plan, its actions ``a`` and ``c``, are fitted.

    The windows are cut from the calibration text, and none of them holds text of a scoring window.

    Args:
        num_windows: the number of windows, at least 2. Default: 96. If the text gives fewer, those
            it gives are used.
        window_tokens: the tokens of each window, at least 2. Default: 256.
        sequential: whether stand-ins are fitted one after the other, each on the hidden states that
            the plan makes before it. Default: false, on those of the full model. A sweep, whose
            plans share their fits, refuses it.
        memory_gib: GiB for the sums that are held at a time, above 0. Default: none, so that one
            pass over the text serves all layers.
    """

    num_windows: int = 96
    window_tokens: int = 256
    sequential: bool = False
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        at_least("fit.num_windows", self.num_windows, 2)
        at_least("fit.window_tokens", self.window_tokens, 2)
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise InputError(f"fit.memory_gib={self.memory_gib:g}: give GiB above 0, or null")

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)


@dataclass
class FootprintConfig:
    """The text for which the memory of plans is compared.

    Args:
        context: the tokens of a sequence, at least 1. Default: 4096.
        batch: the number of sequences, at least 1. Default: 1.
    """

    context: int = 4096
    batch: int = 1

    def __post_init__(self) -> None:
        at_least("footprint.context", self.context, 1)
        at_least("footprint.batch", self.batch, 1)
