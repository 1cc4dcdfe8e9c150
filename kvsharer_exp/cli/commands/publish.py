"""What a sweep leaves in its folder and in MLflow: table, pictures, an HTML page, a saved view."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import optuna

from kvsharer_exp.cli.commands.session import Session
from kvsharer_exp.reporting.columns import columns
from kvsharer_exp.reporting.figures.style import save_pdf, save_png
from kvsharer_exp.reporting.front_table import front_table
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.reporting.sweep_page import Sweep, front_page, pictures
from kvsharer_exp.values.intervals import CONFIDENCE, t_quantile
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry, TrialResult


def publish(
    session: Session,
    study: optuna.Study,
    found: Sequence[TrialResult],
    front: Sequence[TrialResult],
    entries: Sequence[FrontEntry],
    full: dict[str, float],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    volumes: Sequence[float],
) -> str:
    """Write and log all of it; returns the address of the saved view that compares the front.

    ``entries``: the front with its report scores. ``full``: the full cache's scores.
    ``volumes``: hypervolume after each of ``found``.
    """
    config, tracker, run_id = session.config, session.tracker, session.run_id
    label = f"{config.model.name} · {{}}/{session.num_layers} shared"
    members = []
    for entry in entries:
        if entry.mlflow_run_id and tracker.exists(entry.mlflow_run_id):
            members.append(entry.mlflow_run_id)
            kept = {f"retained/{name}": value for name, value in entry.retained.items()}
            tracker.log_map(
                entry.mlflow_run_id,
                SharingMap(entry.kv_source_layers),
                {**entry.scores, **kept, "kv_fraction": entry.kv_fraction},
                name=label.format(entry.num_shared),
            )
    tracker.mark_front(members, study.user_attrs.get("front", []))
    study.set_user_attr("front", members)
    shown = [name for name in columns(full) if name != "perplexity/calibration"]
    compare_url = tracker.save_view(
        run_id,
        [*shown, "retained/perplexity/report"],
        name=f"{config.model.name}: front of {study.study_name}",
    )
    sweep = Sweep(
        model=config.model.name,
        fitness=config.scoring.fitness_label,
        asked=_asked(session, found),
        entries=entries,
        full_scores=full,
        results=found,
        front=front,
        reference_maps=reference_maps,
        volumes=volumes,
        distances=session.distances,
        distance=config.calibration.distance,
        environment={**session.environment, "seed": str(config.seed), "study": study.study_name},
        compare_url=compare_url,
        intervals=_score_intervals(session, chain(front, *reference_maps.values())),
    )
    figures = pictures(sweep)
    pngs = {name: save_png(figure) for name, figure in figures.items()}
    table = to_markdown(front_table(entries, full))
    files: dict[str, str | bytes] = {
        "front.json": json.dumps([entry.to_dict() for entry in entries], indent=2),
        "front.md": table,
        "front.html": front_page(sweep, pngs),
        **{f"{name}.png": png for name, png in pngs.items()},
        **{f"{name}.pdf": save_pdf(figure) for name, figure in figures.items()},
    }
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (session.folder / name).write_bytes(data)
        tracker.log_bytes(run_id, data, name)
    tracker.log_metrics(run_id, {"front_size": len(front), "trials": len(found)})
    note = f"{sweep.headline}\n\n{table}\n[Compare the front]({compare_url}); report: `front.html`"
    tracker.set_tags(run_id, {"mlflow.note.content": note})
    return compare_url


def _score_intervals(
    session: Session, results: Iterable[TrialResult]
) -> dict[str, tuple[float, float]]:
    """What the score of each map may be, by digest, where it is minus the KL."""
    if session.config.scoring.weights != {"kl": 1}:
        return {}
    found = {}
    for result in results:
        interval = kl_interval(session, result)
        if result.score is not None and result.sharing_map.targets and interval is not None:
            low, high = interval
            found[result.sharing_map.digest] = (-high, -low)
    return found


def kl_interval(session: Session, result: TrialResult) -> tuple[float, float] | None:
    """95 % interval of a map's KL over scoring windows (Student's t, not below 0).

    None for a single window, and for a study begun before variances were kept.
    """
    windows = session.scoring_evaluator.num_windows
    if windows < 2 or "kl/variance" not in result.scores:
        return None
    half = t_quantile(CONFIDENCE, windows - 1) * math.sqrt(result.scores["kl/variance"] / windows)
    return max(0.0, result.scores["kl"] - half), result.scores["kl"] + half


def _asked(session: Session, found: Sequence[TrialResult]) -> dict[str, str]:
    """What the sweep was told, in words."""
    config = session.config
    statuses = [result.status.replace("_", " ") for result in found]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    report = [f"{config.heldout.num_windows} × {config.heldout.window_tokens} held-out tokens"]
    return {
        "model": f"{config.model.name} ({session.description['id']}), {session.num_layers} layers",
        "maps": f"{len(found)} ({counts})",
        "searched for": config.scoring.fitness_label,
        "with": f"{config.sampler.kind}, {config.search_space.kind}",
        "compression ratios": ", ".join(f"{ratio:g}" for ratio in config.compression.ratios),
        "calibrated on": f"{config.calibration.num_windows} × {config.calibration.window_tokens} "
        f"tokens of {config.calibration.path}",
        "scored on": f"{session.scoring_evaluator.num_windows} × {config.scoring.window_tokens} "
        "tokens of the same text",
        "reported on": ", ".join([*report, *config.scoring.report.tasks]),
    }
