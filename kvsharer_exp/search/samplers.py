"""Optuna samplers by name; one plain dict of factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from kvsharer_exp.errors import InputError
from kvsharer_exp.search.evolution import MapEvolution
from kvsharer_exp.search.spaces import SearchSpace


def _tpe(seed: int, space: SearchSpace, **options: Any) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, **options)


def _nsgaii(seed: int, space: SearchSpace, **options: Any) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, **options)


def _random(seed: int, space: SearchSpace, **options: Any) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed, **options)


def _evolution(seed: int, space: SearchSpace, **options: Any) -> BaseSampler:
    return MapEvolution(space, seed=seed, **options)


SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": _tpe,
    "nsgaii": _nsgaii,
    "random": _random,
    "evolution": _evolution,
}


def make_sampler(
    kind: str, *, space: SearchSpace, seed: int, trials_so_far: int = 0, **options: Any
) -> BaseSampler:
    """The sampler ``kind`` for maps of ``space``.

    A resumed study draws anew: its seed depends on the trials so far.

    Raises:
        InputError: no such sampler, or an option it does not take.
    """
    if kind not in SAMPLERS:
        raise InputError(f"sampler.kind={kind} is unknown: choose one of {', '.join(SAMPLERS)}")
    try:
        return SAMPLERS[kind](seed * 1_000_003 + trials_so_far, space, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"sampler {kind} does not take these options: {error}") from error
