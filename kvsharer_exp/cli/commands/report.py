"""The command ``report``: finished runs next to the paper's numbers, across runs and models.

It writes Markdown, LaTeX and one HTML page, and logs them to MLflow. No model is loaded. ``run=``
names the runs; without it they are the newest of the store.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.finished_runs import finished_run, names_of, newest, open_runs
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.result_file import head, write_result
from kvsharer_exp.cli.terminal import TurningTable, make_console
from kvsharer_exp.reporting.beside_paper import compare_with_paper, curves, paper_curves
from kvsharer_exp.reporting.comparison import (
    Table,
    headline,
    paper_table,
    tables,
    title_of,
    to_values,
)
from kvsharer_exp.reporting.comparison_files import to_latex_report, to_markdown_report
from kvsharer_exp.reporting.comparison_page import comparison_page
from kvsharer_exp.reporting.figures.comparison import retained_figure
from kvsharer_exp.reporting.figures.style import save_pdf, save_png
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.reporting.paper_numbers import citation, paper_numbers
from kvsharer_exp.reporting.result_readers import READERS, measured
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.score_names import HELD_OUT_PERPLEXITY

_NEWEST = 12
_DRAWN = {HELD_OUT_PERPLEXITY: "held-out perplexity", "tasks/retained": "mean of the tasks"}


def run(config: Config) -> None:
    """Write ``report.md``, ``report.tex``, ``report.html``, the figures and ``result.json``."""
    started, console = time.perf_counter(), make_console()
    runs = read_runs(config, console)
    compared = compare_with_paper([v for run in runs for v in measured(run)], paper_numbers())
    made = tables(compared)
    sentence = headline(compared, len(runs))
    figures = {
        f"retained_{quantity.partition('/')[0]}": (retained_figure(ours, paper, title=title), title)
        for quantity, title in _DRAWN.items()
        if (ours := curves(compared, quantity))
        and (paper := paper_curves(paper_numbers(), quantity))
    }
    pictures = {f"{name}.png": save_png(figure) for name, (figure, _) in figures.items()}
    versions = environment()
    numbers = paper_table(paper_numbers(), [table.quantity for table in made])
    page = comparison_page(
        runs,
        made,
        {
            f"What is retained of the full cache, {title}": pictures[f"{name}.png"]
            for name, (_, title) in figures.items()
        },
        numbers,
        headline=sentence,
        citation=citation(),
        environment=versions,
    )
    files: dict[str, bytes] = {
        "report.md": to_markdown_report(runs, made, numbers, sentence, pictures).encode(),
        "report.tex": to_latex_report(made, sentence).encode(),
        "report.html": page.encode(),
        **pictures,
        **{f"{name}.pdf": save_pdf(figure) for name, (figure, _) in figures.items()},
    }
    _show(console, made)
    console.print(sentence)
    result = {
        **head(
            config,
            model=_only_model(runs),
            seconds=time.perf_counter() - started,
            mlflow_run_id=None,
            versions=versions,
        ),
        "runs": [
            {"mlflow_run_id": r.run_id, "command": r.command, "model": r.result["model"]["id"]}
            for r in runs
        ],
        "headline": sentence,
        "values": to_values(compared),
    }
    _keep(config, console, runs, files, result)


def read_runs(config: Config, console: Any) -> list[FinishedRun]:
    """The runs that ``run=`` names, or else the newest, which are then listed on ``console``.

    A newest run that cannot be read is left out.

    Raises:
        InputError: a run that ``run=`` names is refused (see `finished_run`), or no newest run can
            be read.
    """
    names = names_of(config)
    store = open_runs(config, names)
    if names:
        found = [finished_run(store, name, READERS) for name in names]
        return list({one.run_id: one for one in found}.values())
    found = []
    for stored in newest(store, READERS, _NEWEST):
        try:
            found.append(finished_run(store, stored.run_id, READERS))
        except InputError as error:
            console.print(f"left out: {error}", markup=False)
    if not found:
        raise InputError("none of the newest runs can be read: give run=, or run a command again")
    for one in found:
        console.print(f"newest   {one.run_id}  {one.title}", markup=False)
    return found


def _only_model(runs: Sequence[FinishedRun]) -> Any:
    """The model of the runs if all have the same one, and else None."""
    first = runs[0].result["model"]
    return first if all(run.result["model"] == first for run in runs) else None


def _show(console: Any, made: Sequence[Table]) -> None:
    """Print the tables that have numbers of the paper, or the first table if none has.

    The other tables are in the files only.
    """
    shown = [table for table in made if table.has_paper] or list(made[:1])
    for table in shown:
        console.print(f"[bold]{table.title}[/]")
        console.print(TurningTable.of(table.rows))
        for note in table.notes:
            console.print(note, markup=False)
    if len(shown) < len(made):
        others = "; ".join(title_of(table.quantity) for table in made if table not in shown)
        console.print(f"in the files also: {others}", markup=False)


def _keep(
    config: Config,
    console: Any,
    runs: Sequence[FinishedRun],
    files: Mapping[str, bytes],
    result: Mapping[str, Any],
) -> None:
    """Write everything to the run folder, and to a run that this report has in MLflow."""
    tracking = config.tracking
    folder = Path(HydraConfig.get().runtime.output_dir)
    tracker = Tracker.open(tracking.uri, tracking.experiment, tracking.artifacts)
    models = sorted({run.model for run in runs})
    reported = ",".join(run.run_id for run in runs)
    run_id = tracker.start_run(
        f"{', '.join(models)} · {config.command}",
        tags={"command": config.command, "model": ", ".join(models), "runs": reported},
        params={"runs": reported, "seed": str(config.seed)},
    )
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
            tracker.log_bytes(run_id, content, name)
        text = write_result(folder, {**result, "mlflow_run_id": run_id})
        tracker.log_text(run_id, text, "result.json")
        note = f"{result['headline']} See `report.html`."
        tracker.set_tags(run_id, {"mlflow.note.content": note})
    except BaseException:
        tracker.finish(run_id, "FAILED")
        raise
    tracker.finish(run_id)
    console.print(f"\nresult   {folder / 'result.json'}", markup=False)
    if not config.quiet:
        console.print(f"report   {folder / 'report.html'}   (also .md and .tex)", markup=False)
        console.print(f"mlflow   {tracker.run_url(run_id)}   (kvsharer ui shows it)", markup=False)
        first = shlex.quote(runs[0].source or runs[0].run_id)
        then = next_command(config, "reproduce", f"run={first}")
        console.print(f"next     {then}", markup=False)
