"""The command ``ablate``: the paper's ablations and its reviewers' questions, as one table.

A file of ``conf/experiment/`` (``+experiment=NAME``) or ``ablate.…=`` says what is run: some arms
under every combination of the settings that vary. Each map or KV plan is scored on the same
held-out windows as the full cache and the first arm, so that every difference has an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.named_maps import read_maps
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.ablation_actions import arm_actions
from kvsharer_exp.cli.steps.ablation_memory import AblationMemory
from kvsharer_exp.cli.steps.ablation_outputs import Ablation, publish
from kvsharer_exp.cli.steps.ablation_plans import PlanArms, kept_of
from kvsharer_exp.cli.steps.ablation_rows import RowScorer
from kvsharer_exp.measure.benchmark import check_length, measure
from kvsharer_exp.measure.prediction import predict
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.reporting.ablation import describe
from kvsharer_exp.search.paper.acceptance import pairs_alone
from kvsharer_exp.search.paper.arms import (
    ARMS,
    GIVEN,
    PLAN_ARMS,
    Walker,
    check_arm,
    evaluated,
    is_random,
)
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

Variant = dict[str, Any]
"""One combination of the settings that vary: their values by configuration key."""


def run(
    config: Config,
    log: RunLog,
    loaded: LoadedModel,
    windows: Windows,
    calibration: Calibration,
    scorers: Scorers,
) -> None:
    """Write ``result.json`` with all maps, arms and comparisons, and what else is asked for."""
    arms = [check_arm(arm, (*ARMS, *PLAN_ARMS)) for arm in dict.fromkeys(config.ablate.arms)]
    settings = [(variant, apply(config, variant)) for variant in variants(config)]
    given = read_maps(config, log.tracker) if GIVEN in arms else ()
    if config.ablate.tasks:
        scorers.load_tasks()
    _check_maps(config, loaded, given)
    _check_lengths(config, loaded)
    actions = {a for arm in arms for _, one in settings for a in arm_actions(arm, kept_of(one))}
    check = scorers.require if config.ablate.tasks else scorers.check
    check(actions)
    _check_texts(log, loaded, calibration, scorers, [setting for _, setting in settings], arms)
    with AblationMemory(config, loaded, windows) as memory:
        log.start(loaded.description, windows.texts, experiment=config.ablate.name)
        memory.continue_run(log)
        loaded.tell_contexts(config.ablate.contexts)
        now = calibration.varied(settings[0][1])
        now.keep_ranking(log)
        plan_arms = PlanArms(log, loaded, now, scorers, memory.once)
        ablation = Ablation(RowScorer(config, log, loaded, scorers, memory), now.ranking)
        if config.ablate.every_pair:
            log.say("scoring pairs of layers shared alone")
            most = config.ablate.max_candidates
            ablation.pairs = pairs_alone(now.text.evaluator, now.ranking, max_pairs=most)
        for variant, setting in settings:
            now = now.varied(setting)  # made from the last, so that what has not changed is kept
            walker = now.walker(max_candidates=config.ablate.max_candidates, given=given)
            plan_arms = plan_arms.varied(now)
            for arm in arms:
                if arm in PLAN_ARMS:
                    results, plans = _choose(config, memory, plan_arms, arm, variant)
                    _tell(log, describe(arm, variant), results)
                    ablation.add(variant, arm, 0, results, plans)
                    continue
                for draw in range(config.ablate.draws if is_random(arm) else 1):
                    found = _walk(config, memory, walker, arm, draw, variant)
                    drawn = f" · draw {draw}" if is_random(arm) else ""
                    _tell(log, describe(arm, variant) + drawn, found)
                    ablation.add(variant, arm, draw, found)
        if config.ablate.lengths:
            ablation.timings = _timings(config, log, loaded, ablation)
        publish(config, log, ablation)


def variants(config: Config) -> list[Variant]:
    """Every combination of the settings that vary, by configuration key.

    The text and its size vary slowest, because each of their values costs a calibration.
    """
    wanted = config.ablate
    lists: Mapping[str, Sequence[Any]] = {
        "calibration.path": wanted.calibration_paths,
        "calibration.num_windows": wanted.calibration_sizes,
        "calibration.distance": wanted.distances,
        "calibration.states": wanted.states,
        "search.threshold": wanted.thresholds,
        "footprint.context": wanted.contexts,
    }
    given = {key: list(dict.fromkeys(values)) for key, values in lists.items() if values}
    return [dict(zip(given, values, strict=True)) for values in product(*given.values())]


def apply(config: Config, variant: Variant) -> Config:
    """The configuration with the settings of ``variant``.

    Raises:
        InputError: a value is out of range.
    """
    groups: dict[str, dict[str, Any]] = {"calibration": {}, "search": {}, "footprint": {}}
    for key, value in variant.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    return replace(
        config,
        calibration=replace(config.calibration, **groups["calibration"]),
        search=replace(config.search, **groups["search"]),
        footprint=replace(config.footprint, **groups["footprint"]),
    )


def _check_maps(config: Config, loaded: LoadedModel, given: Sequence[SharingMap]) -> None:
    counts = [num_targets(ratio, loaded.num_layers) for ratio in config.compression.ratios]
    for sharing_map in given:
        loaded.check(sharing_map)
    smallest = min((len(sharing_map.targets) for sharing_map in given), default=0)
    if smallest > max(counts):
        raise InputError(
            f"map= shares {smallest} layers, compression.ratios asks for at most {max(counts)}: "
            f"add the ratio {smallest / loaded.num_layers:.3f}"
        )


def _check_lengths(config: Config, loaded: LoadedModel) -> None:
    for prompt, new in config.ablate.lengths:
        check_length(loaded.model, prompt + new, f"ablate.lengths={prompt}+{new}")


def _check_texts(
    log: RunLog,
    loaded: LoadedModel,
    calibration: Calibration,
    scorers: Scorers,
    settings: Sequence[Config],
    arms: Sequence[str],
) -> None:
    """Refuse texts that overlap or are too short, for any setting, before anything is computed."""
    calibration.text.windows.require("calibration", "scoring", "held_out")
    now = calibration
    for setting in settings:
        now = now.varied(setting)
        now.text.windows.require("calibration")
        PlanArms(log, loaded, now, scorers).require(arms)


def _walk(
    config: Config, memory: AblationMemory, walker: Walker, arm: str, draw: int, variant: Variant
) -> list[GreedyResult]:
    def walk() -> list[Any]:
        found = walker.run(arm, config.compression.ratios, seed=config.seed, draw=draw)
        return [result.to_dict() for result in found]

    return [*map(GreedyResult.from_dict, memory.once(["walk", variant, arm, draw], walk))]


def _choose(
    config: Config, memory: AblationMemory, plan_arms: PlanArms, arm: str, variant: Variant
) -> tuple[list[GreedyResult], list[FittedPlan]]:
    """What an arm of plans chose; of plans that were chosen before only the fits are asked for."""

    made: list[FittedPlan] = []  # if they are chosen now

    def choose() -> list[Any]:
        chosen = plan_arms.run(arm, config.compression.ratios)
        made.extend(fitted for _, fitted in chosen)
        return [[result.to_dict(), str(fitted.plan)] for result, fitted in chosen]

    kept = memory.once(["plans", variant, arm], choose)
    results = [GreedyResult.from_dict(result) for result, _ in kept]
    return results, made or [plan_arms.fit(KVPlan.parse(text)) for _, text in kept]


def _tell(log: RunLog, words: str, found: Sequence[GreedyResult]) -> None:
    longest = max(found, key=lambda result: result.found)
    log.say(
        f"{words}: {longest.found} of {max(r.requested for r in found)} layers, "
        f"{max(map(evaluated, found))} candidates evaluated"
    )


def _timings(
    config: Config, log: RunLog, loaded: LoadedModel, ablation: Ablation
) -> list[dict[str, Any]]:
    """Measure memory and speed of the first arm's maps, cell by cell as ``bench`` does."""
    cells, head = [], ablation.rows[0]
    for row, plan in zip(ablation.rows, ablation.plans, strict=True):
        if (row.arm, row.variant, row.draw) != (head.arm, head.variant, 0) or not row.result.found:
            continue
        for batch, (prompt, new) in product(config.bench.batch_sizes, config.ablate.lengths):
            size = {"batch": batch, "context": prompt, "new_tokens": new}
            measured = measure(
                loaded.model, plan, **size, repeats=config.bench.repeats, seed=config.seed
            )
            predicted = predict(loaded.model, plan.plan, **size)
            where = {"compression": row.result.compression, "batch": batch, "context": prompt}
            cells.append({**where, **measured, "predicted": predicted})
            log.say(f"measured batch {batch}, {prompt} + {new} tokens")
    return cells
