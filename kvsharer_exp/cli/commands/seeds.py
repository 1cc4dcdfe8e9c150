"""Maps a sweep starts from: the paper's, simple layouts, and those of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from kvsharer_exp.cli.commands.search import walk
from kvsharer_exp.cli.commands.session import Session
from kvsharer_exp.measure.ranking import BLOCK_OUTPUT, rank
from kvsharer_exp.model.sharing.architectures import attention_layers, check_map
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.search.paper.arms import Walker
from kvsharer_exp.search.paper.greedy import adjacent_pairs, num_targets, trailing_layers
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.sharing_map import SharingMap, SharingMapError
from kvsharer_exp.values.text import shorten

PAPER = "paper greedy"

Seed = tuple[str, SharingMap]
"""Where a map comes from, and the map."""


def read_seeds(path: Path) -> tuple[str | None, list[SharingMap]]:
    """The model id (where the file names one) and the maps of a JSON file.

    A list of maps or of front entries (front.json), or an object with a ``front`` (result.json).

    Raises:
        InputError: the file cannot be read or holds no maps.
    """
    name = f"study.seeds={shorten(path)}"
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): give a JSON file") from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON: give a list of maps, or a front.json") from error
    model = None
    if isinstance(held, dict):
        model = (held.get("model") or {}).get("id")
        held = held.get("front")
    if not isinstance(held, list) or not held:
        raise InputError(f"{name} holds no maps: give a list of maps, or a sweep's result.json")
    try:
        maps = [e["kv_source_layers"] if isinstance(e, dict) else e for e in held]
        return model, [SharingMap.parse(entry) for entry in maps]
    except (SharingMapError, TypeError, ValueError, KeyError) as error:
        reason = shorten(error, 60)
        raise InputError(f"{name} holds what is no map ({reason}): give maps only") from error


def check_seeds(session: Session) -> list[Seed]:
    """The maps of ``study.seeds``, which must fit the model.

    Raises:
        InputError: they are of another model.
    """
    path = session.config.study.seeds
    if path is None:
        return []
    model, maps = read_seeds(Path(path))
    here = session.description["id"]
    if model is not None and model != here:
        raise InputError(
            f"study.seeds holds maps of {shorten(model, 40)}, but the model is "
            f"{shorten(here, 40)}: give a file of this model, or only its list of maps"
        )
    layers = attention_layers(session.model)
    for sharing_map in maps:
        try:
            check_map(sharing_map, layers)
        except SharingError as error:
            raise InputError(
                f"study.seeds={shorten(path)} holds a map that does not fit "
                f"({shorten(str(error).partition(':')[0])}): give maps of this model"
            ) from error
    return [(f"seed file {Path(path).name}", m) for m in maps if m.targets]


def seeds_of(session: Session, study: optuna.Study, given: Sequence[Seed]) -> list[Seed]:
    """The paper's maps, likely ones and simple layouts, made once a study; then the ``given``.

    The paper's first and largest first, so that none is screened out. Per compression ratio, and
    for one and two layers: the paper's greedy map, the pairs of least block error, the
    similar-first map, trailing layers, adjacent pairs.
    """
    kept = study.user_attrs.get("seeds")
    if kept is None:
        kept = [[origin, list(m.kv_source_layers)] for origin, m in _make(session)]
        study.set_user_attr("seeds", kept)
    return [*[(origin, SharingMap(tuple(sources))) for origin, sources in kept], *given]


def _make(session: Session) -> list[Seed]:
    layers = session.num_layers
    counts = sorted({num_targets(ratio, layers) for ratio in session.config.compression.ratios})
    small = [count for count in (1, 2) if count < min(counts)]
    sizes = sorted({*small, *counts}, reverse=True)
    ratios = [size / layers for size in sizes]

    def greedy_seeds(origin: str, found: Sequence[GreedyResult]) -> list[Seed]:
        return [(origin, SharingMap(r.kv_source_layers)) for r in found if r.found]

    pairs = session.ranking.pairs
    # From the similar end most pairs fail once many layers are shared: a seed is not worth that.
    similar = walk(session, "similar", ratios, max_candidates=3 * sizes[0])
    errors = rank(session.block_errors, model_id=session.ranking.model_id, distance=BLOCK_OUTPUT)
    least = Walker(session.evaluator, errors).run("similar_untested", ratios)
    return [
        *greedy_seeds(PAPER, walk(session, "dissimilar", ratios)),
        *greedy_seeds("least block error", least),
        *greedy_seeds("similar-first greedy", [r for r in similar if r.found == r.requested]),
        *[("trailing layers", trailing_layers(pairs, layers, size)) for size in sizes],
        *[("adjacent pairs", adjacent_pairs(pairs, layers, size)) for size in sizes],
    ]
