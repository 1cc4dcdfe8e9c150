"""Search spaces by name: our own, and those of other packages by entry point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from kvsharer_exp.search.paper.greedy import Advance
from kvsharer_exp.search.spaces.base import SearchSpace, Space, SpaceSetting, refuse_a_single_map
from kvsharer_exp.search.spaces.blocks import Blocks
from kvsharer_exp.search.spaces.greedy_knobs import GreedyKnobs
from kvsharer_exp.search.spaces.layer_sources import LayerSources
from kvsharer_exp.search.spaces.random_keys import RandomKeys
from kvsharer_exp.search.spaces.ranked_pairs import RankedPairs
from kvsharer_exp.search.spaces.suffix import Suffix
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plugins import find_part, options_for
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap

GROUP = "kvsharer_exp.search_spaces"

SPACES: dict[str, Callable[..., SearchSpace]] = {
    "layer_sources": LayerSources,
    "ranked_pairs": RankedPairs,
    "random_keys": RandomKeys,
    "greedy_knobs": GreedyKnobs,
    "blocks": Blocks,
    "suffix": Suffix,
}


def make_space(
    kind: str,
    ranking: DissimilarityRanking,
    *,
    max_shared: int,
    seeds: Sequence[SharingMap] = (),
    rank: Callable[[str, float], DissimilarityRanking] | None = None,
    advance: Advance | None = None,
    reset: Callable[[], None] = lambda: None,
    **options: Any,
) -> SearchSpace:
    """The space ``kind`` for this ranking; the other arguments are those of `SpaceSetting`.

    Raises:
        InputError: no such space, an unknown option, fewer pairs than ``max_shared`` needs, or
            a space that holds a single map.
    """
    create = _find(kind)
    targets = {pair.target for pair in ranking.pairs}
    if len(targets) < max_shared:
        raise InputError(
            f"{max_shared} shared layers asked, but only {len(targets)} layers of this model may "
            "read another: lower compression.ratios"
        )
    if len(ranking.pairs) == 1:
        only = ranking.pairs[0]
        full = SharingMap.identity(ranking.num_layers)
        refuse_a_single_map(kind, [full.share(only.target, only.source)])
    setting = SpaceSetting(ranking, max_shared, tuple(seeds), rank, advance, reset)
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
    """Refuse, before there is a ranking, what `make_space` would.

    Raises:
        InputError: no such space, or one of ours that does not take these options.
    """
    create = _find(kind)
    if kind in SPACES:
        pair = LayerPair(target=1, source=0, distance=0.0)
        with _options_for(kind):
            create(SpaceSetting(DissimilarityRanking("", "", 2, (pair,)), 1), **options)


def _find(kind: str) -> Callable[..., SearchSpace]:
    return find_part(kind, SPACES, group=GROUP, key="search_space.kind")


def _options_for(kind: str) -> AbstractContextManager[None]:
    return options_for(f"search_space {kind}", TypeError, see="search_spaces/")
