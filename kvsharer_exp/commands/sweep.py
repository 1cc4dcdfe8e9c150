"""``sweep``: the Optuna search over sharing maps → Pareto front of memory against accuracy.

Load once, calibrate, rank; score the seeds, then what the sampler asks for; score the front again
on text and tasks the search never saw. The same command continues its study.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvsharer_exp.commands.calibrate import log_ranking
from kvsharer_exp.commands.search import walk
from kvsharer_exp.commands.session import Session, fit_scores, open_session, start_run
from kvsharer_exp.config import Config
from kvsharer_exp.errors import InputError
from kvsharer_exp.figures import front_figure, hypervolume_figure, save_png
from kvsharer_exp.footprint import footprint
from kvsharer_exp.front import hypervolume, pareto_front
from kvsharer_exp.records import FrontEntry, GreedyResult, TrialResult
from kvsharer_exp.report import front_page, front_table, print_front, to_markdown
from kvsharer_exp.scoring import retained
from kvsharer_exp.search.greedy import adjacent_pairs, num_targets, trailing_layers
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.search.spaces import make_space
from kvsharer_exp.search.stages import SCORE_REFERENCE, StagedScorer
from kvsharer_exp.search.study import count_cached, open_study, results, run_search
from kvsharer_exp.sharing_map import SharingMap

PAPER = "paper greedy"


def run(config: Config) -> None:
    """Write ``result.json`` with the front; everything else is in MLflow."""
    with open_session(config) as session:
        _ = session.tasks  # named wrongly or out of reach: say so before model time
        counts = [num_targets(ratio, session.num_layers) for ratio in config.compression.ratios]
        identity = _identity(session)
        name = config.study.name or _study_name(config, identity)
        with open_study(
            name,
            storage=config.study.storage,
            folder=Path(config.tracking.folder) / "studies",
            fresh=config.study.fresh,
        ) as study:
            _claim(study, identity)
            _sweep(session, study, max(counts))


def _sweep(session: Session, study: optuna.Study, max_shared: int) -> None:
    config, tracker = session.config, session.tracker
    before = study.user_attrs.get("mlflow_run_id")
    known = before if before and tracker.exists(before) else None
    start_run(session, run_id=known, study=study.study_name)
    study.set_user_attr("mlflow_run_id", session.run_id)
    if known:
        session.say(f"continuing study {study.study_name}: {len(results(study))} maps known")
    log_ranking(session)
    seeds = _seeds(session, study)
    space = make_space(
        config.search_space.kind,
        session.ranking,
        max_shared=max_shared,
        seeds=[sharing_map for _, sharing_map in seeds],
        **config.search_space.options,
    )
    sampler = make_sampler(
        config.sampler.kind,
        space=space,
        seed=config.seed,
        trials_so_far=len(study.get_trials(deepcopy=False)),
        **config.sampler.options,
    )
    search_tasks = session.tasks[0]
    scorer = StagedScorer(
        session.model,
        session.evaluator,
        fitness=config.scoring.fitness,
        tasks=session.task_scorer(search_tasks, config.scoring.search.limit)
        if search_tasks
        else None,
        screen_batches=1 if config.study.screen_windows else 0,
        margin=config.study.margin,
    )
    session.say("scored the full cache")
    reference = (1.0, SCORE_REFERENCE[config.scoring.fitness])
    known_before = len(results(study))
    searched = session.seconds
    with _progress(session, study, reference) as on_result:
        found = run_search(
            study,
            space,
            scorer,
            sampler=sampler,
            footprint=lambda sharing_map: footprint(session.model, sharing_map),
            seeds=seeds,
            n_trials=config.study.n_trials,
            minutes=config.study.minutes,
            on_result=on_result,
        )
    searched = session.seconds - searched
    front = pareto_front(found)
    if not front:
        reasons = sorted({result.reason for result in found if result.reason})
        raise RuntimeError(f"no map was scored to the end: {'; '.join(reasons) or 'no trial ran'}")
    paper = [result for result in found if result.origin == PAPER and result not in front]
    session.say(f"scoring {len(front)} maps of the front on report texts and tasks")
    full, entries, beaten = _report(session, study, front, paper, scorer.full_tasks)
    _publish(session, study, found, front, entries, full, reference)
    if beaten:
        session.console.print(f"the {PAPER} maps that are not on the front, on the same items:")
        print_front(session.console, beaten, full)
    session.finish(
        {
            "study": study.study_name,
            "search_space": config.search_space.kind,
            "sampler": config.sampler.kind,
            "fitness": config.scoring.fitness,
            "trials": {
                **{
                    status: sum(result.status == status for result in found)
                    for status in ("complete", "screened_out", "failed")
                },
                "cached": count_cached(study),
            },
            "hypervolume": hypervolume(_points(front), reference),
            "hypervolume_reference": {"kv_fraction": reference[0], "score": reference[1]},
            "seconds_per_trial": sum(result.seconds for result in found) / len(found),
            "overhead_seconds_per_trial": _overhead(found, len(found) - known_before, searched),
            "front": [entry.to_dict() for entry in entries],
            "paper_greedy": [entry.to_dict() for entry in beaten],
            "full": {"scores": full},
        },
        then=f"kvsharer sweep model={config.model.name} study.n_trials={2 * len(found)}",
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


def _seeds(session: Session, study: optuna.Study) -> list[tuple[str, SharingMap]]:
    """Maps to start from, the paper's first and largest first, so that none is screened out.

    Per compression ratio, and for one and two layers: the paper's greedy map, the similar-first
    map, trailing layers, adjacent pairs.
    """
    kept = study.user_attrs.get("seeds")
    if kept is None:
        kept = [[origin, list(m.kv_source_layers)] for origin, m in _make_seeds(session)]
        study.set_user_attr("seeds", kept)
    return [(origin, SharingMap(tuple(sources))) for origin, sources in kept]


def _make_seeds(session: Session) -> list[tuple[str, SharingMap]]:
    layers = session.num_layers
    counts = sorted({num_targets(ratio, layers) for ratio in session.config.compression.ratios})
    small = [count for count in (1, 2) if count < min(counts)]
    sizes = sorted({*small, *counts}, reverse=True)
    ratios = [size / layers for size in sizes]

    def greedy_seeds(origin: str, found: Sequence[GreedyResult]) -> list[tuple[str, SharingMap]]:
        return [(origin, SharingMap(r.kv_source_layers)) for r in found if r.found]

    pairs = session.ranking.pairs
    # From the similar end most pairs fail once many layers are shared: a seed is not worth that.
    similar = walk(session, "similar", ratios, max_candidates=3 * sizes[0])
    return [
        *greedy_seeds(PAPER, walk(session, "dissimilar", ratios)),
        *greedy_seeds("similar-first greedy", [r for r in similar if r.found == r.requested]),
        *[("trailing layers", trailing_layers(pairs, layers, size)) for size in sizes],
        *[("adjacent pairs", adjacent_pairs(pairs, layers, size)) for size in sizes],
    ]


@contextmanager
def _progress(session: Session, study: optuna.Study, reference: tuple[float, float]) -> Any:
    """A bar with trial, best and time left; yields what logs each result to MLflow."""
    config, tracker = session.config, session.tracker
    found = list(results(study))
    bar = Progress(
        TextColumn("search"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeRemainingColumn(),
        console=session.console,
    )
    task = bar.add_task("search", total=config.study.n_trials, completed=len(found), best="")

    def on_result(result: TrialResult) -> None:
        found.append(result)
        volume = hypervolume(_points(found), reference)
        label = f"{config.model.name} · {_size(result)} shared"
        run_id = tracker.log_trial(
            session.run_id, result, {"hypervolume": volume}, name=f"{label} · {_short(result)}"
        )
        # One attribute a trial: a dictionary of all would be written whole every time.
        study.set_user_attr(_run_key(result.sharing_map), run_id)
        tracker.log_metrics(session.run_id, {"hypervolume": volume}, step=len(found))
        bar.update(task, advance=1, best=f"{_size(result)} {_short(result)} hv {volume:.3f}")
        if not session.console.is_terminal:
            session.say(
                f"{len(found)}/{config.study.n_trials}  {_size(result)} shared  "
                f"{_short(result)}  {result.origin}  hypervolume {volume:.4f}"
            )

    with bar:
        yield on_result


def _run_key(sharing_map: SharingMap) -> str:
    """The study's attribute that holds the MLflow run of a map."""
    return f"run {sharing_map.digest}"


def _size(result: TrialResult) -> str:
    return f"{len(result.sharing_map.targets)}/{result.sharing_map.num_layers}"


def _short(result: TrialResult) -> str:
    if result.status == "complete":
        return f"kl {result.scores['kl']:.3g}"
    return result.status.replace("_", " ")


def _points(found: Sequence[TrialResult]) -> list[tuple[float, float]]:
    return [(r.footprint.kv_fraction, r.score) for r in found if r.score is not None]


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
    kept: dict[str, dict[str, float]] = dict(study.user_attrs.get(key, {}))

    def scores_of(sharing_map: SharingMap) -> dict[str, float]:
        if sharing_map.digest not in kept:
            kept[sharing_map.digest] = session.report_scores(sharing_map)
            study.set_user_attr(key, kept)
        return kept[sharing_map.digest]

    identity = SharingMap.identity(session.num_layers)
    full = fit_scores(session.evaluator.full_scores) | full_tasks | scores_of(identity)
    held = study.user_attrs

    def entry_of(result: TrialResult) -> FrontEntry:
        sharing_map = result.sharing_map
        scores = {**result.scores, **scores_of(sharing_map)}
        scores = {name: value for name, value in scores.items() if name in full}
        session.say(f"{_size(result)} shared ({result.origin}): report scores done")
        return FrontEntry(
            kv_source_layers=sharing_map.kv_source_layers,
            digest=sharing_map.digest,
            num_shared=len(sharing_map.targets),
            kv_fraction=result.footprint.kv_fraction,
            scores=scores,
            retained=retained(scores, full),
            mlflow_run_id=held.get(_run_key(sharing_map), ""),
            origin=result.origin,
        )

    ratios = session.config.compression.ratios
    asked = {num_targets(ratio, session.num_layers) for ratio in ratios}
    known = [r for r in paper if r.score is not None and len(r.sharing_map.targets) in asked]
    known.sort(key=lambda result: len(result.sharing_map.targets))
    return full, [entry_of(result) for result in front], [entry_of(result) for result in known]


def _publish(
    session: Session,
    study: optuna.Study,
    found: Sequence[TrialResult],
    front: Sequence[TrialResult],
    entries: Sequence[FrontEntry],
    full: dict[str, float],
    reference: tuple[float, float],
) -> None:
    """The front as table, PNG and self-contained HTML, in the run folder and in MLflow."""
    config, tracker, run_id = session.config, session.tracker, session.run_id
    for entry in entries:
        if entry.mlflow_run_id:
            tracker.log_metrics(
                entry.mlflow_run_id,
                {
                    **{f"report/{name}": value for name, value in entry.scores.items()},
                    **{f"retained/{name}": value for name, value in entry.retained.items()},
                },
            )
    previous = study.user_attrs.get("front", [])
    members = [entry.mlflow_run_id for entry in entries if entry.mlflow_run_id]
    tracker.mark_front(members, previous)
    study.set_user_attr("front", members)
    volumes = [hypervolume(_points(found[: count + 1]), reference) for count in range(len(found))]
    paper = {PAPER: [result for result in found if result.origin == PAPER]}
    label = f"score ({config.scoring.fitness})"
    title = f"{config.model.name}: memory against accuracy"
    full_score = 1.0 if config.scoring.fitness == "lm_eval" else 0.0
    picture = front_figure(
        found,
        front,
        reference_maps=paper,
        score_label=label,
        title=title,
        full_score=full_score,
    )
    table = to_markdown(front_table(entries, full))
    page = front_page(
        title=title,
        entries=entries,
        full_scores=full,
        results=found,
        front=front,
        reference_maps=paper,
        score_label=label,
        full_score=full_score,
        environment={**session.environment, "seed": str(config.seed), "study": study.study_name},
    )
    files: dict[str, str | bytes] = {
        "front.json": json.dumps([entry.to_dict() for entry in entries], indent=2),
        "front.md": table,
        "front.html": page,
        "front.png": save_png(picture),
        "hypervolume.png": save_png(hypervolume_figure(volumes)),
    }
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (session.folder / name).write_bytes(data)
        tracker.log_bytes(run_id, data, name)
    tracker.log_metrics(run_id, {"front_size": len(front), "trials": len(found)})
    tracker.set_tags(run_id, {"mlflow.note.content": f"{title}\n\n{table}"})
    print_front(session.console, entries, full)
