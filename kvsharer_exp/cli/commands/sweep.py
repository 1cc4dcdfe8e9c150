"""The command ``sweep``: search plans with Optuna for the front of memory against accuracy.

The search space says whether they are KV plans (the default) or sharing maps only. The command
loads the model once, calibrates and ranks the pairs. It scores the seeds, and then what the sampler
asks for. More text decides between the best of each size (the finals). In the end the front is
scored again on text and tasks that the search never saw. The same command continues
its study.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command, same_command
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.result_file import told_by_tasks
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.executors import open_executor, require_memory
from kvsharer_exp.cli.steps.front_lines import print_front
from kvsharer_exp.cli.steps.plan_candidates import PlanParts, check_keeps, fits_of, wanted
from kvsharer_exp.cli.steps.sweep_entries import EntryMaker
from kvsharer_exp.cli.steps.sweep_outputs import asked_of, keep_files, mark_front
from kvsharer_exp.cli.steps.sweep_search import search_in
from kvsharer_exp.cli.steps.sweep_setup import (
    identity_of,
    say_left_out,
    say_short_screens,
    solved_seeds,
    staged_scorer,
    start_sweep,
    study_name,
    sweep_search,
    sweep_seeds,
    sweep_space,
)
from kvsharer_exp.measure.fits import fingerprints
from kvsharer_exp.model.fit_files import save_each
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.reporting.sweep_result import SweepResult
from kvsharer_exp.search.coordinator import Search
from kvsharer_exp.search.finals import Finals
from kvsharer_exp.search.front import GrowingFront, Rung, Rungs, kv_of, pareto_front
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.search.samplers import check_sampler
from kvsharer_exp.search.seeds import PAPER, SeedFile
from kvsharer_exp.search.spaces.registry import check_space, is_for_plans
from kvsharer_exp.search.stages import agreements
from kvsharer_exp.search.study import check_storage, open_study
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import FRONT, FRONT_FITS
from kvsharer_exp.values.trial import TrialResult


def run(
    config: Config,
    log: RunLog,
    loaded: LoadedModel,
    windows: Windows,
    calibration: Calibration,
    scorers: Scorers,
    plans: Plans,
) -> None:
    """Write ``result.json`` with the front; everything else is in MLflow."""
    seed_file = _check_options(config)
    scorers.load_tasks()
    max_shared = max(num_targets(ratio, loaded.num_layers) for ratio in config.compression.ratios)
    windows.require("calibration", "scoring", "held_out")
    of_plans = is_for_plans(config.search_space.kind)
    scorers.require(wanted(config, loaded) if of_plans else ())
    if of_plans:
        check_keeps(config, loaded, windows)
    require_memory(config, loaded)
    given = seed_file.seeds(loaded.description["id"], loaded.layers) if seed_file else []
    identity = identity_of(config, loaded, windows, plans=of_plans)
    with open_study(
        config.study.name or study_name(config, identity),
        storage=config.study.storage,
        folder=Path(config.tracking.folder) / "studies",
        fresh=config.study.fresh,
    ) as store:
        store.claim(identity)
        fits = fits_of(config, loaded, plans) if of_plans else {}
        store.claim_fits(fingerprints(fits))
        start_sweep(log, loaded, windows, store)
        loaded.tell_contexts()
        calibration.keep_ranking(log)
        seeds = [*sweep_seeds(config, log, calibration, store), *given]
        parts = None
        if of_plans:
            parts = PlanParts.make(config, log, loaded, windows, calibration, fits, store, seeds)
        fitted = parts.fitted if parts else FittedPlan.of
        space = sweep_space(config, calibration, max_shared, seeds, parts)
        say_left_out(config, log, space, given)
        say_short_screens(config, log, scorers.fitness.num_windows)
        seeds = solved_seeds(log, space, seeds)
        scorer = staged_scorer(config, loaded, scorers, fits)
        search = sweep_search(config, loaded, calibration, scorer, store, space, seeds)
        log.say("scored the full cache")
        reference = (1.0, scorer.reference_score)
        known_before, began = len(store.results()), log.seconds
        with open_executor(config, log, loaded, scorer, identity, fits) as executor:
            found = search_in(config, log, store, search, executor, reference)
        searched = log.seconds - began
        scorers.fitness.reset()
        rung = Rungs(parts.budgets) if parts else kv_of
        front, finals = _finals(config, log, windows, scorers, store, found, searched, fitted, rung)
        log.say(f"scoring the {len(front)} of the front on report texts and tasks")
        entries = EntryMaker(config, log, loaded, scorers, store, scorer.full_tasks, fitted)
        sweep = SweepResult(
            model=loaded.name,
            architecture=type(loaded.model).__name__,
            study=store.name,
            fitness=config.scoring.fitness_label,
            asked=asked_of(config, loaded, scorers, found),
            entries=[entries.make(result) for result in front],
            beaten=[entries.make(result) for result in _beaten(config, found, front)],
            full_scores=entries.full_scores,
            full_intervals=entries.full_intervals,
            results=found,
            front=front,
            reference_maps={PAPER: [result for result in found if result.origin == PAPER]},
            volumes=GrowingFront(found, reference).volumes,
            distances=calibration.distances,
            distance=config.calibration.distance,
            finals=finals,
            environment={**log.environment, "seed": str(config.seed), "study": store.name},
            intervals=entries.score_intervals([*front, *_of_paper(found)]),
        )
        sweep = replace(sweep, compare_url=mark_front(log, store, sweep))
        keep_files(log, sweep)
        if parts:
            folder = log.folder / FRONT_FITS
            save_each(folder, (fitted(result.plan) for result in front), origin=plans.origin)
            if folder.is_dir():
                with log.delivering("the fits"):
                    log.tracker.log_folder(log.run_id, folder)
        _show(log, sweep)
        new = found[known_before:]
        log.finish(
            {
                **_result(config, sweep, store, search, scorers.fitness.num_windows),
                "trials_at_start": known_before,  # above 0: this run continued an earlier one
                "hypervolume_reference": {"kv_fraction": reference[0], "score": reference[1]},
                "overhead_seconds_per_trial": _overhead(new, searched),
                **told_by_tasks(scorers.directions, scorers.pass_marks),
            },
            then=_next(config, log, sweep, searched),
        )


def _check_options(config: Config) -> SeedFile | None:
    """Refuse options that can be refused without a model; returns the file of ``study.seeds``."""
    check_space(config.search_space.kind, **config.search_space.options)
    check_sampler(config.sampler.kind, **config.sampler.options)
    check_storage(config.study.storage)
    kind, asked = config.search_space.kind, config.compression
    if not is_for_plans(kind) and (asked.kv or asked.kv_gib):
        raise InputError(
            f"compression.kv sets budgets of plans, and search_space={kind} holds sharing maps: "
            "give compression.ratios, or search_space=layer_actions"
        )
    if config.fit.sequential and is_for_plans(kind):
        raise InputError(
            "fit.sequential=true fits the stand-ins of one plan in order, and a sweep fits each by "
            "itself for all plans: leave it out, and give it to evaluate or export with plan="
        )
    return SeedFile.read(Path(config.study.seeds)) if config.study.seeds is not None else None


def _finals(
    config: Config,
    log: RunLog,
    windows: Windows,
    scorers: Scorers,
    store: StudyStore,
    found: Sequence[TrialResult],
    searched: float,
    fitted: Callable[[KVPlan], FittedPlan],
    rung: Rung,
) -> tuple[list[TrialResult], dict[str, Any]]:
    """Hold the finals; returns the front and what ``result.json`` says of the finals.

    ``searched``: the seconds of ``study.minutes`` that the search has spent. Of each ``rung`` one
    stays.
    """
    front = pareto_front(found)
    if not front:
        reasons = sorted({result.reason for result in found if result.reason})
        raise RuntimeError(f"no map was scored to the end: {'; '.join(reasons) or 'no trial ran'}")
    if not config.holds_finals:
        return front, {"windows": 0}
    minutes = config.study.minutes
    of_plans = is_for_plans(config.search_space.kind)
    left = float("inf") if minutes is None else max(0.0, 60 * minutes - searched)
    deadline = time.monotonic() + left
    finals = Finals(
        lambda: windows.beside_fits(windows.finals) if of_plans else windows.finals,
        scorers.final,
        config.scoring.batch_size,
        is_over=lambda: time.monotonic() >= deadline,
        say=log.say,
        fitted=fitted,
        rung=rung,
    )
    return finals.hold(store, found, front)


def _of_paper(found: Sequence[TrialResult]) -> list[TrialResult]:
    return [result for result in found if result.origin == PAPER]


def _beaten(
    config: Config, found: Sequence[TrialResult], front: Sequence[TrialResult]
) -> list[TrialResult]:
    """The paper's maps, at the ratios asked for, that are not on the front; smallest first."""
    layers = found[0].plan.num_layers
    asked = {num_targets(ratio, layers) for ratio in config.compression.ratios}
    beaten = [r for r in _of_paper(found) if r.score is not None and r not in front]
    return sorted((r for r in beaten if r.num_shared in asked), key=lambda r: r.num_shared)


def _show(log: RunLog, sweep: SweepResult) -> None:
    print_front(log.console, sweep.entries, sweep.full_scores, sweep.full_intervals)
    if sweep.beaten:
        log.console.print(f"the {PAPER} maps that are not on the front, on the same items:")
        print_front(log.console, sweep.beaten, sweep.full_scores, sweep.full_intervals)


def _result(
    config: Config, sweep: SweepResult, store: StudyStore, search: Search, num_windows: int
) -> dict[str, Any]:
    found = sweep.results
    return {
        "study": sweep.study,
        "mlflow_compare_url": sweep.compare_url,
        "search_space": config.search_space.kind,
        "sampler": config.sampler.kind,
        "fitness": sweep.fitness,
        "trials": {
            **{
                status: sum(result.status == status for result in found)
                for status in ("complete", "screened_out", "failed")
            },
            "cached": store.count_cached(),
        },
        "stages": {
            "agreement": [a.to_dict() for a in agreements(found, config.scoring.weights)],
            "windows": num_windows,
            "screening_margins": search.bars.margins,
        },
        "finals": sweep.finals,
        "hypervolume": sweep.volumes[-1],
        "seconds_per_trial": sum(result.seconds for result in found) / len(found),
        "front": [entry.to_dict() for entry in sweep.entries],
        "paper_greedy": [entry.to_dict() for entry in sweep.beaten],
        "full": {"scores": sweep.full_scores, "intervals": sweep.full_intervals},
    }


def _next(config: Config, log: RunLog, sweep: SweepResult, searched: float) -> str:
    """The line that goes on with the search; or one with a plan of the front, if it has ended."""
    study, count = config.study, len(sweep.results)
    minutes = config.search_minutes
    ended = count < study.n_trials if minutes is None else searched < 60 * minutes
    if ended:  # flat, or without a new map
        least = min(entry.kv_fraction for entry in sweep.entries)
        share = max(0.5, math.ceil(least * 10_000) / 10_000)
        front = shlex.quote(f"{log.folder / FRONT}:{share}")
        return next_command(config, "evaluate", f"plan={front}")
    if minutes is not None:  # as many of them again
        return same_command(config)
    return same_command(config, f"study.n_trials={2 * count}", without=["study.n_trials"])


def _overhead(new: Sequence[TrialResult], searched: float) -> float | None:
    """The seconds per ``new`` trial that go to sampler, study and MLflow; None without trials."""
    if not new:
        return None
    return max(0.0, searched - sum(result.seconds for result in new)) / len(new)
