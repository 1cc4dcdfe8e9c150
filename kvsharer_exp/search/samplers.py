"""Optuna samplers by name; one plain dict of factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from kvsharer_exp.errors import InputError


def _tpe(seed: int, **options: Any) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, **options)


def _nsgaii(seed: int, **options: Any) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, **options)


def _random(seed: int, **options: Any) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed, **options)


SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": _tpe,
    "nsgaii": _nsgaii,
    "random": _random,
}


def make_sampler(kind: str, *, seed: int, trials_so_far: int = 0, **options: Any) -> BaseSampler:
    """The sampler ``kind``. A resumed study draws anew: its seed depends on the trials so far.

    Raises:
        InputError: no such sampler, or an option it does not take.
    """
    if kind not in SAMPLERS:
        raise InputError(f"sampler.kind={kind} is unknown: choose one of {', '.join(SAMPLERS)}")
    try:
        return SAMPLERS[kind](seed * 1_000_003 + trials_so_far, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"sampler {kind} does not take these options: {error}") from error
