"""Make the sampler of a sweep by name: one of Optuna's, one of our strategies, or a plugin's.

The command ``sweep`` checks the configured sampler with `check_sampler` before the model is loaded,
and makes it with `make_sampler`. `SAMPLERS` and `STRATEGIES` are plain dicts of factories.

Another package adds a sampler by an entry point of the group ``kvsharer_exp.samplers``. It loads a
factory that is called with a seed, the search space, and ``sampler.options`` as keywords.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from kvsharer_exp.search.reseeded import Reseeded
from kvsharer_exp.search.spaces.base import SearchSpace, holds_plans
from kvsharer_exp.search.strategies.beam import Beam
from kvsharer_exp.search.strategies.evolution import Evolution
from kvsharer_exp.search.strategies.map_sampler import MapSampler, Strategy
from kvsharer_exp.search.strategies.plan_beam import PlanBeam
from kvsharer_exp.search.strategies.plan_evolution import PlanEvolution
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plugins import find_part, options_for


def _reseeded(name: str) -> Callable[..., BaseSampler]:
    """A factory of one of Optuna's samplers that draws what a resumed study would draw too."""

    def make(seed: int, space: SearchSpace, **options: Any) -> BaseSampler:
        kind = getattr(optuna.samplers, name)
        return Reseeded(_quiet(lambda seed: kind(seed=seed, **options)), seed)

    return make


def _tpe(seed: int, space: SearchSpace, **options: Any) -> BaseSampler:
    # Trials under way count as bad ones, so that workers do not repeat each other.
    return _reseeded("TPESampler")(seed, space, **{"constant_liar": True, **options})


def _quiet(make: Callable[[int], BaseSampler]) -> Callable[[int], BaseSampler]:
    def made(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return make(seed)

    return made


def _qmc(seed: int, space: SearchSpace, **options: Any) -> BaseSampler:
    quiet: Any = {"warn_independent_sampling": False, "warn_asynchronous_seeding": False}
    return _quiet(lambda seed: optuna.samplers.QMCSampler(seed=seed, **quiet, **options))(seed)


def _ours(
    strategy: Callable[..., Strategy],
    errors: Sequence[Sequence[float]] | None,
    seed: int,
    space: SearchSpace,
    **options: Any,
) -> BaseSampler:
    if holds_plans(space):
        strategy = _FOR_PLANS[strategy]
        if "offspring" in options:  # solving a plan takes longer than changing a map
            options["offspring"] = max(1, options["offspring"] // 10)
    return MapSampler(space, strategy(**options), seed=seed, errors=errors)


_FOR_PLANS: dict[Any, Callable[..., Strategy]] = {Evolution: PlanEvolution, Beam: PlanBeam}
"""The strategies of the same names for a space of plans."""


GROUP = "kvsharer_exp.samplers"
"""The group of entry points by which other packages add samplers."""

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": _tpe,
    "nsgaii": _reseeded("NSGAIISampler"),
    "gp": _reseeded("GPSampler"),
    "random": _reseeded("RandomSampler"),
    "qmc": _qmc,
}
"""Optuna's samplers, by name."""

STRATEGIES: dict[str, Callable[..., Strategy]] = {"evolution": Evolution, "beam": Beam}
"""Our own strategies, by name; `MapSampler` makes a sampler of each."""


def make_sampler(
    kind: str,
    *,
    space: SearchSpace,
    seed: int,
    trials_so_far: int = 0,
    errors: Sequence[Sequence[float]] | None = None,
    **options: Any,
) -> BaseSampler:
    """Make the sampler ``kind`` for maps of ``space``.

    Args:
        trials_so_far: is given to another package's sampler in its seed, so that a resumed study
            does not draw the same maps again. Ours and Optuna's take the number of each trial.
        errors: the block errors of the pairs, ``[target][source]``; only our strategies use them.
        options: options of the sampler itself.

    Raises:
        InputError: there is no such sampler, it does not take an option, or what was made is no
            sampler.
    """
    ours = {name: partial(_ours, make, errors) for name, make in STRATEGIES.items()}
    create = find_part(kind, SAMPLERS | ours, group=GROUP, key="sampler.kind")
    with _options_for(kind):
        fixed = kind in ours or (kind in SAMPLERS and kind != "qmc")
        sampler = create(seed * 1_000_003 + (0 if fixed else trials_so_far), space, **options)
    if not isinstance(sampler, BaseSampler):
        raise InputError(
            f"sampler.kind={kind} makes a {type(sampler).__name__}, which is no Optuna sampler: "
            "give a factory of optuna.samplers.BaseSampler"
        )
    return sampler


def check_sampler(kind: str, **options: Any) -> None:
    """Refuse, before there is a space, a name and options that `make_sampler` would refuse.

    Options of another package's sampler are not checked, because it may need the space for that.

    Raises:
        InputError: there is no such sampler, or it is one of ours or Optuna's and does not take
            these options.
    """
    ours: dict[str, Callable[..., Any]] = {**SAMPLERS, **STRATEGIES}
    create = find_part(kind, ours, group=GROUP, key="sampler.kind")
    with _options_for(kind):
        if kind in STRATEGIES:
            create(**options)
        elif kind in SAMPLERS:  # Optuna's samplers do not look at the space
            create(0, None, **options)


def _options_for(kind: str) -> AbstractContextManager[None]:
    return options_for(f"sampler {kind}", TypeError, ValueError, see="conf/sampler/")
