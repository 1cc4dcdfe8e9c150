"""Finds and makes search spaces by name: those of this package, and those of other packages.

The command ``sweep`` checks the configured space with `check_space` before the model is loaded, and
makes the space with `make_space` once there is a ranking. Another package adds a space by an entry
point of the group ``kvsharer_exp.search_spaces``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

from kvsharer_exp.search.candidates import Candidate
from kvsharer_exp.search.paper.greedy import Advance
from kvsharer_exp.search.spaces.base import SearchSpace, Space, SpaceSetting, refuse_a_single_map
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plugins import find_part, options_for
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap

GROUP = "kvsharer_exp.search_spaces"


def _own_spaces() -> dict[str, Callable[..., SearchSpace]]:
    """Every file of this folder beside ``base.py`` and this one, and the space that it defines."""
    found: dict[str, Callable[..., SearchSpace]] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in ("__init__", "base", Path(__file__).stem):
            module = import_module(f"{__package__}.{file.stem}")
            kinds: list[Any] = [k for k in vars(module).values() if isinstance(k, type)]
            kinds = [k for k in kinds if issubclass(k, Space) and k.__module__ == module.__name__]
            (found[file.stem],) = kinds
    return found


SPACES = _own_spaces()
"""The spaces of this package by name, which is the name of the file."""


def make_space(
    kind: str,
    ranking: DissimilarityRanking,
    *,
    max_shared: int,
    seeds: Sequence[SharingMap] = (),
    rank: Callable[[str, float], DissimilarityRanking] | None = None,
    advance: Advance | None = None,
    reset: Callable[[], object] = lambda: None,
    candidates: Sequence[Candidate] = (),
    budgets: Sequence[float] = (),
    **options: Any,
) -> SearchSpace:
    """Make the space ``kind`` for this ranking.

    ``options`` are those of the space; the other arguments are those of `SpaceSetting`.

    Raises:
        InputError: there is no such space, an option is unknown, fewer than ``max_shared`` layers
            may read another one, the space holds a single map, or what was made is no space.
    """
    create = _find(kind)
    of_plans = is_for_plans(kind)
    targets = {pair.target for pair in ranking.pairs}
    if len(targets) < max_shared and not of_plans:
        raise InputError(
            f"{max_shared} shared layers asked, but only {len(targets)} layers of this model may "
            "read another: lower compression.ratios"
        )
    if len(ranking.pairs) == 1 and not of_plans:
        only = ranking.pairs[0]
        full = SharingMap.identity(ranking.num_layers)
        refuse_a_single_map(kind, [full.share(only.target, only.source)])
    setting = SpaceSetting(
        ranking, max_shared, tuple(seeds), rank, advance, reset, tuple(candidates), tuple(budgets)
    )
    with _options_for(kind):
        space = create(setting, **options)
    if not isinstance(space, SearchSpace):
        raise InputError(
            f"search_space.kind={kind} makes a {type(space).__name__}, which is no search space: "
            "give it ranking, max_shared, distributions, decode and encode"
        )
    if isinstance(space, Space):
        space.check()
    return space


def check_space(kind: str, **options: Any) -> None:
    """Refuse, before there is a ranking, a name and options that `make_space` would refuse.

    Raises:
        InputError: there is no such space, or it is one of ours and does not take these options.
    """
    create = _find(kind)
    if kind in SPACES:
        pair = LayerPair(target=1, source=0, distance=0.0)
        with _options_for(kind):
            create(SpaceSetting(DissimilarityRanking("", "", 2, (pair,)), 1), **options)


def is_for_plans(kind: str) -> bool:
    """Whether the space ``kind`` holds KV plans, and not sharing maps only.

    Raises:
        InputError: there is no such space.
    """
    return bool(getattr(_find(kind), "holds_plans", False))


def _find(kind: str) -> Callable[..., SearchSpace]:
    return find_part(kind, SPACES, group=GROUP, key="search_space.kind")


def _options_for(kind: str) -> AbstractContextManager[None]:
    return options_for(f"search_space {kind}", TypeError, see="search_spaces/")
