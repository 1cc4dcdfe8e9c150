"""A KV plan with the numbers of its stand-ins.

`apply_plan`, `make_plan` and the evaluator take a `FittedPlan`. ``measure/fits.py`` makes the fits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, eq=False)
class Fit:
    """The numbers of one stand-in.

    ``tensors``: ``bias`` (hidden,), and ``weight`` (hidden, hidden) of an affine one. ``norm`` is
    the name in the block of the norm after the attention, if the stand-in replaces that as well.
    ``error`` is the block error on the text that chose between two ways of fitting.
    """

    tensors: Mapping[str, torch.Tensor]
    norm: str | None = None
    error: float | None = None

    @cached_property
    def fingerprint(self) -> str:
        """12 hex characters that identify the numbers and their place."""
        digest = hashlib.sha256((self.norm or "").encode())
        for name, tensor in sorted(self.tensors.items()):
            held = tensor.detach().cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(held.numpy().tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class FittedPlan:
    """``plan`` with a `Fit` for each of its layers that needs one.

    ``origin``: on which model and text, and how, the fits were made, as files of fits hold it.

    Raises:
        InputError: a fit is missing.
    """

    plan: KVPlan
    fits: Mapping[int, Fit] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [i for i, a in enumerate(self.plan.actions) if a.fitted and i not in self.fits]
        if missing:
            text = self.plan.texts[missing[0]]
            raise InputError(
                f"layer {missing[0]} has the stand-in {text}, which has no fit: "
                "make it with fit_plan(model, plan, windows)"
            )

    @classmethod
    def of(cls, value: FittedPlan | KVPlan | SharingMap) -> FittedPlan:
        """``value`` with its fits.

        Raises:
            InputError: it needs fits and has none.
        """
        return value if isinstance(value, FittedPlan) else cls(KVPlan.of(value))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """For every layer a text that identifies its action and the numbers of its fit."""
        return tuple(
            f"{text} {self.fits[layer].fingerprint}" if action.fitted else text
            for layer, (text, action) in enumerate(
                zip(self.plan.texts, self.plan.actions, strict=True)
            )
        )
