"""``ablate``: the paper's ablations and its reviewers' questions → one table with intervals.

What is run is a file of ``conf/experiment/`` (``+experiment=NAME``) or ``ablate.…=``: arms under
every combination of the settings that vary, each map scored on the same held-out windows, beside
the full cache and the first arm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from kvsharer_exp.cli.commands.ablate_outputs import Outcome, publish
from kvsharer_exp.cli.commands.ablate_scorer import Scorer
from kvsharer_exp.cli.commands.calibrate import log_ranking
from kvsharer_exp.cli.commands.evaluate import read_map
from kvsharer_exp.cli.commands.session import Session, open_session, start_run
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.measure.benchmark import check_length, measure
from kvsharer_exp.measure.prediction import predict
from kvsharer_exp.model.sharing.architectures import attention_layers, check_map
from kvsharer_exp.reporting.ablation import Row, describe
from kvsharer_exp.search.paper.acceptance import PairScore, pairs_alone
from kvsharer_exp.search.paper.arms import GIVEN, Walker, check_arm, evaluated, is_random
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.sharing_map import SharingMap

Variant = dict[str, Any]


def run(config: Config) -> None:
    """Write ``result.json`` with every map, arm, comparison and whatever else the file asks for."""
    arms = [check_arm(arm) for arm in dict.fromkeys(config.ablate.arms)]
    settings = [(variant, apply(config, variant)) for variant in variants(config)]
    with open_session(config) as session:
        given = read_given(config, session.tracker) if GIVEN in arms else ()
        if config.ablate.tasks:
            _ = session.tasks  # named wrongly or out of reach: say so before model time
        _check(session, given, [setting for _, setting in settings])
        start_run(session, experiment=config.ablate.name)
        now = session.varied(settings[0][1])
        log_ranking(now)
        outcome = Outcome(Scorer(session), now.ranking)
        if config.ablate.every_pair:
            outcome.pairs = _pairs(now)
        for variant, setting in settings:
            now = now.varied(setting)  # from the last one: what has not changed is kept
            walker = _walker(now, given)
            for arm in arms:
                for draw in range(config.ablate.draws if is_random(arm) else 1):
                    outcome.add(variant, arm, draw, _walk(session, walker, arm, draw, variant))
        if config.ablate.lengths:
            outcome.timings = _timings(session, outcome.rows)
        publish(session, outcome)


def variants(config: Config) -> list[Variant]:
    """Every combination of the settings that vary, by configuration key; the text and its size
    vary slowest, as they cost a calibration each."""
    wanted = config.ablate
    lists: Mapping[str, Sequence[Any]] = {
        "calibration.path": wanted.calibration_paths,
        "calibration.num_windows": wanted.calibration_sizes,
        "calibration.distance": wanted.distances,
        "calibration.states": wanted.states,
        "search.threshold": wanted.thresholds,
    }
    given = {key: list(dict.fromkeys(values)) for key, values in lists.items() if values}
    return [dict(zip(given, values, strict=True)) for values in product(*given.values())]


def apply(config: Config, variant: Variant) -> Config:
    """The configuration under ``variant``.

    Raises:
        InputError: a value out of range.
    """
    groups: dict[str, dict[str, Any]] = {"calibration": {}, "search": {}}
    for key, value in variant.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    return replace(
        config,
        calibration=replace(config.calibration, **groups["calibration"]),
        search=replace(config.search, **groups["search"]),
    )


def read_given(config: Config, tracker: Tracker) -> tuple[SharingMap, ...]:
    """The maps of the arm ``given``: those of ``map=``, a finished sweep's front included.

    Raises:
        InputError: ``map=`` names none.
    """
    if isinstance(config.map, str) and re.fullmatch("[0-9a-f]{32}", config.map):
        front = tracker.front_maps(config.map)
        if front:
            return tuple(front)
    return (read_map(config, tracker),)


def _check(session: Session, given: Sequence[SharingMap], settings: Sequence[Config]) -> None:
    """What needs the model's shape or the texts, before anything is computed."""
    config = session.config
    counts = [num_targets(ratio, session.num_layers) for ratio in config.compression.ratios]
    for sharing_map in given:
        check_map(sharing_map, attention_layers(session.model))
    smallest = min((len(sharing_map.targets) for sharing_map in given), default=0)
    if smallest > max(counts):
        raise InputError(
            f"map= shares {smallest} layers, compression.ratios asks for at most {max(counts)}: "
            f"add the ratio {smallest / session.num_layers:.3f}"
        )
    check_length(session.model, config.heldout.window_tokens, "heldout.window_tokens")
    for prompt, new in config.ablate.lengths:
        check_length(session.model, prompt + new, f"ablate.lengths={prompt}+{new}")
    now, _ = session, session.calibration_windows
    for setting in settings:
        now = now.varied(setting)
        _ = now.calibration_windows  # overlapping or too little text


def _walker(varied: Session, given: tuple[SharingMap, ...]) -> Walker:
    return Walker(
        varied.evaluator,
        varied.ranking,
        threshold=varied.config.search.threshold,
        all_windows=varied.config.search.all_windows,
        max_candidates=varied.config.ablate.max_candidates,
        given=given,
    )


def _walk(
    session: Session, walker: Walker, arm: str, draw: int, variant: Variant
) -> list[GreedyResult]:
    config = session.config
    found = walker.run(arm, config.compression.ratios, seed=config.seed, draw=draw)
    longest = max(found, key=lambda result: result.found)
    words = describe(arm, variant) + (f" · draw {draw}" if is_random(arm) else "")
    session.say(
        f"{words}: {longest.found} of {max(r.requested for r in found)} layers, "
        f"{max(map(evaluated, found))} candidates evaluated"
    )
    return found


def _pairs(session: Session) -> list[PairScore]:
    most = session.config.ablate.max_candidates
    session.say("scoring pairs of layers shared alone")
    return pairs_alone(session.evaluator, session.ranking, max_pairs=most)


def _timings(session: Session, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Memory and speed of the first arm's maps, cell by cell as ``bench`` measures them."""
    config, cells = session.config, []
    first = [row for row in rows if row.arm == rows[0].arm and row.variant == rows[0].variant]
    for row in (row for row in first if row.result.found and row.draw == 0):
        sharing_map = SharingMap(row.result.kv_source_layers)
        for batch, (prompt, new) in product(config.bench.batch_sizes, config.ablate.lengths):
            measured = measure(
                session.model,
                sharing_map,
                batch=batch,
                context=prompt,
                new_tokens=new,
                repeats=config.bench.repeats,
                seed=config.seed,
            )
            predicted = predict(session.model, sharing_map, batch=batch, context=prompt)
            where = {"compression": row.result.compression, "batch": batch, "context": prompt}
            cells.append({**where, **measured, "predicted": predicted})
            session.say(f"measured batch {batch}, {prompt} + {new} tokens")
    return cells
