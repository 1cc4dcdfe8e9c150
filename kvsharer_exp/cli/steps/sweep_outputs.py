"""Keep what a ``sweep`` found in its folder and in MLflow.

The command calls `mark_front` for the marks and the saved view in MLflow, and then `keep_files` for
the table, the pictures and the HTML page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.reporting.figures.style import save_pdf, save_png
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.reporting.plan_kinds import is_map, plan_params, size_words
from kvsharer_exp.reporting.sweep_page import front_page, pictures
from kvsharer_exp.reporting.sweep_result import SweepResult
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.score_names import (
    CALIBRATION_PERPLEXITY,
    HELD_OUT_PERPLEXITY,
    retained_metrics,
    share_name,
    table_columns,
)
from kvsharer_exp.values.trial import TrialResult


def asked_of(
    config: Config, loaded: LoadedModel, scorers: Scorers, found: Sequence[TrialResult]
) -> dict[str, str]:
    """What the sweep was asked, in words, for its page."""
    statuses = [result.status.replace("_", " ") for result in found]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    report = [f"{config.heldout.num_windows} × {config.heldout.window_tokens} held-out tokens"]
    return {
        "model": f"{loaded.name} ({loaded.description['id']}), {loaded.num_layers} layers",
        "maps": f"{len(found)} ({counts})",
        "searched for": config.scoring.fitness_label,
        "with": f"{config.sampler.kind}, {config.search_space.kind}",
        "compression ratios": ", ".join(f"{ratio:g}" for ratio in config.compression.ratios),
        "calibrated on": f"{config.calibration.num_windows} × {config.calibration.window_tokens} "
        f"tokens of {config.calibration.path}",
        "scored on": f"{scorers.fitness.num_windows} × {config.scoring.window_tokens} "
        "tokens of the same text",
        "reported on": ", ".join([*report, *config.scoring.report.tasks]),
    }


def mark_front(log: RunLog, store: StudyStore, sweep: SweepResult) -> str:
    """Tag the maps and plans of the front in MLflow, and log each of them as a model.

    Returns:
        The address of the saved view that compares the front; empty if MLflow stays away.
    """
    with log.delivering("the marks of the front"):
        return _mark_front(log, store, sweep)
    return ""


def _mark_front(log: RunLog, store: StudyStore, sweep: SweepResult) -> str:
    members = []
    for entry in sweep.entries:
        if entry.mlflow_run_id and log.tracker.exists(entry.mlflow_run_id):
            members.append(entry.mlflow_run_id)
            kept = retained_metrics(entry.retained, entry.intervals)
            plan = entry.kv_plan
            log.tracker.log_map(
                entry.mlflow_run_id,
                plan,
                {**entry.scores, **kept, "kv_fraction": entry.kv_fraction},
                name=f"{sweep.model} · {size_words(plan)}",
                about={} if is_map(plan) else plan_params(plan),
            )
    log.tracker.mark_front(members, store.front_runs)
    store.front_runs = members
    shown = [name for name in table_columns(sweep.full_scores) if name != CALIBRATION_PERPLEXITY]
    return log.tracker.save_view(
        log.run_id,
        [*shown, share_name(HELD_OUT_PERPLEXITY)],
        name=f"{sweep.model}: front of {sweep.study}",
    )


def keep_files(log: RunLog, sweep: SweepResult) -> None:
    """Write and log the front as JSON, Markdown and HTML, and every picture as PNG and PDF."""
    figures = pictures(sweep)
    pngs = {name: save_png(figure) for name, figure in figures.items()}
    table = "\n\n".join([to_markdown(sweep.table).rstrip(), *sweep.notes]) + "\n"
    files: dict[str, str | bytes] = {
        "front.json": json.dumps([entry.to_dict() for entry in sweep.entries], indent=2),
        "front.md": table,
        "front.html": front_page(sweep, pngs),
        **{f"{name}.png": png for name, png in pngs.items()},
        **{f"{name}.pdf": save_pdf(figure) for name, figure in figures.items()},
    }
    for name, content in files.items():
        log.keep(name, content)
    log.log_metrics({"front_size": len(sweep.front), "trials": len(sweep.results)})
    note = (
        f"{sweep.headline}\n\n{table}\n[Compare the front]({sweep.compare_url}); "
        "report: `front.html`"
    )
    with log.delivering("the note"):
        log.tracker.set_tags(log.run_id, {"mlflow.note.content": note})
