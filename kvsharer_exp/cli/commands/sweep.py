"""``sweep``: the Optuna search over sharing maps → Pareto front of memory against accuracy.

Load once, calibrate, rank; score the seeds, then what the sampler asks for; let more text decide
between the best of each size; score the front again on text and tasks the search never saw. The
same command continues its study.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna

from kvsharer_exp.cli.commands.calibrate import log_ranking
from kvsharer_exp.cli.commands.finals import hold_finals, search_minutes
from kvsharer_exp.cli.commands.progress import progress, run_key, size_of
from kvsharer_exp.cli.commands.publish import kl_interval, publish
from kvsharer_exp.cli.commands.seeds import PAPER, Seed, check_seeds, read_seeds, seeds_of
from kvsharer_exp.cli.commands.session import Session, fit_scores, open_session, start_run
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.front_lines import print_front
from kvsharer_exp.measure.ranking import distance_matrix, rank
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.search.front import GrowingFront, pareto_front
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.search.samplers import STRATEGIES, check_sampler, make_sampler
from kvsharer_exp.search.spaces.base import SearchSpace
from kvsharer_exp.search.spaces.registry import check_space, make_space
from kvsharer_exp.search.stages import StagedScorer, agreements, find_fitness
from kvsharer_exp.search.study import count_cached, open_study, results, run_search
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.score_names import retained
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry, TrialResult


def run(config: Config) -> None:
    """Write ``result.json`` with the front; everything else is in MLflow."""
    check_space(config.search_space.kind, **config.search_space.options)
    check_sampler(config.sampler.kind, **config.sampler.options)
    for name in config.scoring.weights:
        find_fitness(name)
    if config.study.seeds is not None:
        read_seeds(Path(config.study.seeds))
    with open_session(config) as session:
        _ = session.tasks  # named wrongly or out of reach: say so before model time
        counts = [num_targets(ratio, session.num_layers) for ratio in config.compression.ratios]
        _ = session.report_windows  # too little text for them: say so before the search
        given = check_seeds(session)
        identity = _identity(session)
        name = config.study.name or _study_name(config, identity)
        with open_study(
            name,
            storage=config.study.storage,
            folder=Path(config.tracking.folder) / "studies",
            fresh=config.study.fresh,
        ) as study:
            _claim(study, identity)
            _sweep(session, study, max(counts), given)


def _sweep(session: Session, study: optuna.Study, max_shared: int, given: Sequence[Seed]) -> None:
    config, tracker = session.config, session.tracker
    before = study.user_attrs.get("mlflow_run_id")
    known = before if before and tracker.exists(before) else None
    start_run(session, run_id=known, study=study.study_name)
    study.set_user_attr("mlflow_run_id", session.run_id)
    if known:
        session.say(f"continuing study {study.study_name}: {len(results(study))} maps known")
    log_ranking(session)
    seeds = seeds_of(session, study, given)
    space = _space(session, max_shared, [sharing_map for _, sharing_map in seeds])
    outside = sum(space.encode(sharing_map) is None for _, sharing_map in given)
    if outside:
        session.say(
            f"{outside} of {len(given)} maps of study.seeds are left out: "
            f"{config.search_space.kind} holds none such with 1 to {max_shared} shared layers"
        )
    sampler = make_sampler(
        config.sampler.kind,
        space=space,
        seed=config.seed,
        trials_so_far=len(study.get_trials(deepcopy=False)),
        errors=session.block_errors if config.sampler.kind in STRATEGIES else None,
        **config.sampler.options,
    )
    search_tasks = session.tasks[0]
    scorer = StagedScorer(
        session.model,
        session.scoring_evaluator,
        fitness=config.scoring.weights,
        tasks=session.task_scorer(search_tasks, config.scoring.search.limit)
        if search_tasks
        else None,
        screen_windows=config.study.screen_windows,
        margin=config.study.margin,
    )
    session.say("scored the full cache")
    reference = (1.0, scorer.reference_score)
    known_before = len(results(study))
    searched = session.seconds
    with progress(session, study, reference) as on_result:
        found = run_search(
            study,
            space,
            scorer,
            sampler=sampler,
            footprint=lambda sharing_map: footprint(session.model, sharing_map),
            seeds=seeds,
            n_trials=config.study.n_trials if config.study.minutes is None else None,
            minutes=search_minutes(config),
            on_result=on_result,
            together=config.scoring.maps_per_forward,
            look_ahead=scorer.look_ahead,
        )
    searched = session.seconds - searched
    if not found:
        raise InputError(
            f"study.minutes={config.study.minutes:g} ended before one map was scored: give more"
        )
    front = pareto_front(found)
    if not front:
        reasons = sorted({result.reason for result in found if result.reason})
        raise RuntimeError(f"no map was scored to the end: {'; '.join(reasons) or 'no trial ran'}")
    minutes = config.study.minutes
    left = None if minutes is None else max(0.0, minutes - searched / 60)
    front, finals = hold_finals(session, study, found, front, minutes=left)
    paper = [result for result in found if result.origin == PAPER and result not in front]
    session.say(f"scoring {len(front)} maps of the front on report texts and tasks")
    full, entries, beaten = _report(session, study, front, paper, scorer.full_tasks)
    references = {PAPER: [result for result in found if result.origin == PAPER]}
    volumes = GrowingFront(found, reference).volumes
    compare_url = publish(session, study, found, front, entries, full, references, volumes)
    print_front(session.console, entries, full)
    if beaten:
        session.console.print(f"the {PAPER} maps that are not on the front, on the same items:")
        print_front(session.console, beaten, full)
    session.finish(
        {
            "study": study.study_name,
            "mlflow_compare_url": compare_url,
            "search_space": config.search_space.kind,
            "sampler": config.sampler.kind,
            "fitness": config.scoring.fitness_label,
            "trials": {
                **{
                    status: sum(result.status == status for result in found)
                    for status in ("complete", "screened_out", "failed")
                },
                "cached": count_cached(study),
            },
            "stages": {
                "agreement": [a.to_dict() for a in agreements(found, config.scoring.weights)],
                "windows": session.scoring_evaluator.num_windows,
                "screening_margins": scorer.margins(found),
            },
            "finals": finals,
            "hypervolume": volumes[-1],
            "hypervolume_reference": {"kv_fraction": reference[0], "score": reference[1]},
            "seconds_per_trial": sum(result.seconds for result in found) / len(found),
            "overhead_seconds_per_trial": _overhead(found, len(found) - known_before, searched),
            "front": [entry.to_dict() for entry in entries],
            "paper_greedy": [entry.to_dict() for entry in beaten],
            "full": {"scores": full},
        },
        then=f"kvsharer sweep model={config.model.name} study.n_trials={2 * len(found)}",
    )


def _space(session: Session, max_shared: int, seeds: Sequence[SharingMap]) -> SearchSpace:
    config = session.config

    def rank_by(distance: str, key_weight: float) -> DissimilarityRanking:
        matrix = distance_matrix(
            session.model, session.means, distance=distance, key_weight=key_weight
        )
        return rank(matrix, model_id=session.description["id"], distance=distance)

    return make_space(
        config.search_space.kind,
        session.ranking,
        max_shared=max_shared,
        seeds=seeds,
        rank=rank_by,
        advance=session.evaluator.advance if config.search.acceptance else None,
        reset=session.evaluator.reset,
        **config.search_space.options,
    )


def _identity(session: Session) -> dict[str, Any]:
    """What makes two scores comparable: same model, texts, fitness, tasks and seeds."""
    config = session.config
    return {
        "model": {key: str(value) for key, value in session.description.items()},
        "texts": session.parts.fingerprints,
        "calibration": asdict(config.calibration),
        "compression": asdict(config.compression),
        "search": asdict(config.search),
        "search_space": asdict(config.search_space),
        "sampler": asdict(config.sampler),
        "screen": [config.study.screen_windows, config.study.margin],
        "windows": [config.scoring.num_windows, config.scoring.window_tokens],
        "fitness": config.scoring.fitness,
        "search_tasks": asdict(config.scoring.search),
        "seed": config.seed,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _study_name(config: Config, identity: dict[str, Any]) -> str:
    parts = (config.model.name, config.search_space.kind, config.sampler.kind, _digest(identity))
    return "-".join(parts)


def _claim(study: optuna.Study, identity: dict[str, Any]) -> None:
    """Refuse to mix scores of two configurations in one study."""
    held = study.user_attrs.get("identity")
    if held is None:
        study.set_user_attr("identity", identity)
        return
    changed = [key for key, value in identity.items() if held.get(key) != value]
    if changed:
        raise InputError(
            f"study {study.study_name} holds scores of another {', '.join(changed)}: "
            "give another study.name, or study.fresh=true to forget them"
        )


def _overhead(found: Sequence[TrialResult], new: int, searched: float) -> float | None:
    """Seconds per new trial outside the scoring: sampler, study, MLflow."""
    if new <= 0:
        return None
    return max(0.0, searched - sum(result.seconds for result in found[-new:])) / new


def _report(
    session: Session,
    study: optuna.Study,
    front: Sequence[TrialResult],
    paper: Sequence[TrialResult],
    full_tasks: dict[str, float],
) -> tuple[dict[str, float], list[FrontEntry], list[FrontEntry]]:
    """The full cache, the front and the paper's maps at the asked-for ratios on what the search
    never saw; scored once and kept in the study."""
    wanted = {
        "report": asdict(session.config.scoring.report),
        "heldout": asdict(session.config.heldout),
    }
    key = f"report {_digest(wanted)}"
    kept: dict[str, Any] = dict(study.user_attrs.get(key, {}))

    def report_of(sharing_map: SharingMap) -> tuple[dict[str, float], dict[str, list[float]]]:
        if sharing_map.digest not in kept:
            kept[sharing_map.digest] = session.report(sharing_map)
            study.set_user_attr(key, kept)
        scores, intervals = kept[sharing_map.digest]
        return scores, intervals

    identity = SharingMap.identity(session.num_layers)
    full = fit_scores(session.scoring_evaluator.full_scores) | full_tasks | report_of(identity)[0]
    held = study.user_attrs

    def entry_of(result: TrialResult) -> FrontEntry:
        sharing_map = result.sharing_map
        reported, intervals = report_of(sharing_map)
        scores = {**result.scores, **reported}
        scores = {name: value for name, value in scores.items() if name in full}
        session.say(f"{size_of(result)} shared ({result.origin}): report scores done")
        kl = kl_interval(session, result)
        return FrontEntry(
            kv_source_layers=sharing_map.kv_source_layers,
            digest=sharing_map.digest,
            num_shared=len(sharing_map.targets),
            kv_fraction=result.footprint.kv_fraction,
            scores=scores,
            retained=retained(scores, full),
            mlflow_run_id=held.get(run_key(sharing_map), ""),
            origin=result.origin,
            intervals={**({"kl": list(kl)} if kl is not None else {}), **intervals},
        )

    ratios = session.config.compression.ratios
    asked = {num_targets(ratio, session.num_layers) for ratio in ratios}
    known = [r for r in paper if r.score is not None and len(r.sharing_map.targets) in asked]
    known.sort(key=lambda result: len(result.sharing_map.targets))
    return full, [entry_of(result) for result in front], [entry_of(result) for result in known]
