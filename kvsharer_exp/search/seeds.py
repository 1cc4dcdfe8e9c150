"""The maps that a sweep starts from: the paper's, likely ones, simple layouts, those of a file.

The command ``sweep`` makes the first kinds with `make_seeds`, and reads ``study.seeds`` with
`SeedFile`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.search.paper.arms import Walker
from kvsharer_exp.search.paper.greedy import adjacent_pairs, num_targets, trailing_layers
from kvsharer_exp.search.study_store import Seed
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import shorten
from kvsharer_exp.values.text_files import read_json, read_text, why_unreadable

PAPER = "paper greedy"
"""The origin of the maps that the paper's own search finds."""

Walk = Callable[[str, Sequence[float], int | None], list[GreedyResult]]
"""Gives the greedy maps in an order of pairs, at some ratios, after at most so many candidates."""


@dataclass(frozen=True)
class SeedFile:
    """The maps and plans of a file, and the id of their model; None if the file names none."""

    path: Path
    model_id: str | None
    maps: Sequence[SharingMap | KVPlan]

    @classmethod
    def read(cls, path: Path) -> SeedFile:
        """Read the maps, or the plans, of a JSON file.

        It holds a list of maps or of front entries (front.json), or an object with a ``front``
        (result.json).

        Raises:
            InputError: the file cannot be read or holds no maps.
        """
        name = f"study.seeds={shorten(path)}"
        try:
            held: Any = read_json(read_text(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{name} cannot be read ({why_unreadable(error)}): give a JSON file"
            ) from error
        except json.JSONDecodeError as error:
            raise InputError(
                f"{name} is not JSON (line {error.lineno}): give a list of maps, or a front.json"
            ) from error
        model_id = None
        if isinstance(held, dict):
            model = held.get("model")
            model_id = str(model["id"]) if isinstance(model, dict) and "id" in model else None
            held = held.get("front")
        if not isinstance(held, list) or not held:
            raise InputError(f"{name} holds no maps: give a list of maps, or a sweep's result.json")
        try:
            return cls(path, model_id, list(map(_read, held)))
        except (InputError, TypeError, ValueError, KeyError) as error:
            reason = shorten(error, 60)
            raise InputError(f"{name} holds what is no map ({reason}): give maps only") from error

    def seeds(self, model_id: str, layers: tuple[AttentionLayer, ...]) -> list[Seed]:
        """All but the full cache, as seeds for the model of these ``layers``.

        Raises:
            InputError: the file names another model, or a map does not fit the ``layers``.
        """
        if self.model_id is not None and self.model_id != model_id:
            raise InputError(
                f"study.seeds holds maps of {shorten(self.model_id, 40)}, but the model is "
                f"{shorten(model_id, 40)}: give a file of this model, or only its list of maps"
            )
        for sharing_map in self.maps:
            try:
                check_plan(sharing_map, layers)
            except SharingError as error:
                raise InputError(
                    f"study.seeds={shorten(self.path)} holds a map that does not fit "
                    f"({shorten(str(error).partition(':')[0])}): give maps of this model"
                ) from error
        full = KVPlan.full(len(layers))
        return [(f"seed file {self.path.name}", m) for m in self.maps if KVPlan.of(m) != full]


def _read(entry: Any) -> SharingMap | KVPlan:
    """The map or plan of an entry of a front, which names both where it can, or a map itself."""
    if not isinstance(entry, dict):
        return SharingMap.parse(entry)
    sources = entry.get("kv_source_layers")
    return KVPlan.parse(entry["plan"]) if sources is None else SharingMap.parse(sources)


def make_seeds(
    ranking: DissimilarityRanking,
    error_walker: Walker,
    walk: Walk,
    ratios: Sequence[float],
) -> list[Seed]:
    """Make the seeds of each compression ratio, and of one and two shared layers.

    They are the paper's greedy map, the pairs of least block error, the similar-first map, trailing
    layers and adjacent pairs. The paper's maps come first, the largest of them first, so that none
    of them is screened out. A similar-first map is left out if it has fewer layers than asked for.

    Args:
        ranking: the pairs that may share, most dissimilar first.
        error_walker: walks the ranking by block errors.
        walk: the greedy strategy on ``ranking``.
    """
    layers = ranking.num_layers
    counts = sorted({num_targets(ratio, layers) for ratio in ratios})
    small = [count for count in (1, 2) if count < min(counts)]
    sizes = sorted({*small, *counts}, reverse=True)
    wanted = [size / layers for size in sizes]
    # From the similar end, most pairs fail once many layers are shared. A seed is not worth so many
    # candidates, so there is a limit.
    similar = walk("similar", wanted, 3 * sizes[0])
    least = error_walker.run("similar_untested", wanted)
    return [
        *_of_greedy(PAPER, walk("dissimilar", wanted, None)),
        *_of_greedy("least block error", least),
        *_of_greedy("similar-first greedy", [r for r in similar if r.found == r.requested]),
        *[("trailing layers", trailing_layers(ranking.pairs, layers, size)) for size in sizes],
        *[("adjacent pairs", adjacent_pairs(ranking.pairs, layers, size)) for size in sizes],
    ]


def _of_greedy(origin: str, found: Sequence[GreedyResult]) -> list[Seed]:
    return [(origin, SharingMap(result.kv_source_layers)) for result in found if result.found]
