"""The command ``reproduce``: make a recorded run again, and say which of its values match.

The run is made again from its recorded configuration, in the folder ``again/`` of this run. A sweep
is made in a study of its own. Versions, commit and texts that are not the same are listed first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, read_write

from kvsharer_exp.cli.config.compose import to_config
from kvsharer_exp.cli.config.model import DEFAULT_MODEL
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.finished_runs import finished_run, names_of, open_runs
from kvsharer_exp.cli.session.parts import run_command
from kvsharer_exp.cli.session.result_file import head, write_result
from kvsharer_exp.cli.terminal import TurningTable, make_console
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.shipping.reproduction import (
    Value,
    compare_results,
    differing_surroundings,
    drew_other_maps,
    summary,
    values_table,
    why_other_maps,
)
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError

KINDS = ("search", "sweep", "evaluate", "ablate", "bench")
_SHOWN = 20  # the most values that differ on the terminal; the file has all
_OURS = ("command", "run", "quiet", "debug")
_OUR_GROUPS = ("hydra", "tracking", "reproduce")


def run(config: Config) -> int:
    """Write ``result.json`` and ``reproduction.md``; returns 0 if every value matches, else 1."""
    started, console = time.perf_counter(), make_console()
    _check_overrides(HydraConfig.get().overrides.task)
    names = names_of(config)
    if len(names) != 1:
        raise InputError(
            f"reproduce takes one run, {len(names)} given: give run=<MLflow run id>, "
            "or several with -m"
        )
    recorded = finished_run(open_runs(config, names), names[0], KINDS)
    again_config = recorded_config(recorded, config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _run_folder(folder / "again"):
        run_command(again_config)
    again = json.loads((folder / "again" / "result.json").read_text(encoding="utf-8"))
    surroundings = differing_surroundings(recorded.result, again)
    values = compare_results(recorded.result, again, config.reproduce.tolerance)
    sentence = _sentence(values, config.reproduce.tolerance)
    table = [["what differs around it", "recorded", "now"], *map(list, surroundings)]
    _show(console, table, values, sentence)
    if recorded.command == "sweep" and drew_other_maps(values):
        console.print(why_other_maps(recorded.result))
    result = {
        **head(
            config,
            model=again["model"],
            seconds=time.perf_counter() - started,
            mlflow_run_id=again["mlflow_run_id"],
            versions=again["versions"],
        ),
        "seed": again["seed"],
        "reproduces": recorded.run_id,
        "tolerance": config.reproduce.tolerance,
        "matches": all(value.matches for value in values),
        "surroundings": [{"what": w, "recorded": b, "now": a} for w, b, a in surroundings],
        "values": [
            {"path": v.path, "recorded": v.recorded, "again": v.again, "verdict": v.verdict}
            for v in values
        ],
    }
    page = [f"# {recorded.title}, run {recorded.run_id}, again", sentence]
    page += [to_markdown(rows) for rows in (table, summary(values), values_table(values))]
    texts = {
        "reproduction.md": "\n\n".join(page),
        "reproduction.json": write_result(folder, result),
    }
    (folder / "reproduction.md").write_text(texts["reproduction.md"], encoding="utf-8")
    _log(config, again["mlflow_run_id"], recorded.run_id, sentence, texts)
    console.print(f"\nresult   {folder / 'result.json'}", markup=False)
    console.print(f"values   {folder / 'reproduction.md'}", markup=False)
    return 0 if result["matches"] else 1


def recorded_config(recorded: FinishedRun, config: Config) -> Config:
    """The recorded configuration, with the store of this command and a study of its own.

    A sweep may have been continued, or ended by the clock. So the new sweep evaluates as many maps
    as the recorded one held, and its finals have as many windows.

    Raises:
        InputError: no configuration was recorded, or this version cannot read it.
    """
    if not recorded.config:
        raise InputError(
            f"run {recorded.source} has no config.yaml and its folder no .hydra/: "
            "give a run of this store"
        )
    try:
        held = to_config(OmegaConf.create(dict(recorded.config)))
    except InputError as error:
        raise InputError(f"run {recorded.run_id} was made by another version: {error}") from error
    trials = recorded.result.get("trials", {})
    count = sum(trials.get(status, 0) for status in ("complete", "screened_out", "failed"))
    study = replace(
        held.study,
        name=f"again-{recorded.run_id[:8]}-{time.time_ns():x}",
        storage=None,
        fresh=False,
        minutes=None,
        final_windows=recorded.result.get("finals", {}).get("windows", 0),
        n_trials=count or held.study.n_trials,
    )
    return replace(
        held,
        command=recorded.command,
        study=study,
        tracking=config.tracking,
        quiet=config.quiet,
        debug=config.debug,
    )


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that would be ignored, because the recorded run decides."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        known = key in _OURS or key.partition(".")[0] in _OUR_GROUPS
        if not known and override != f"+model={DEFAULT_MODEL}":
            raise InputError(
                f"reproduce runs what was recorded: leave out {override.lstrip('+')[:80]}"
            )


@contextmanager
def _run_folder(folder: Path) -> Iterator[None]:
    """Let commands in the block write to ``folder``, not to the folder of this run."""
    folder.mkdir(parents=True)
    runtime: Any = HydraConfig.get().runtime
    before = runtime.output_dir
    with read_write(runtime):
        runtime.output_dir = str(folder)
        try:
            yield
        finally:
            runtime.output_dir = before


def _sentence(values: Sequence[Value], tolerance: float) -> str:
    differing = sum(not value.matches for value in values)
    exact = sum(value.verdict == "exact" for value in values)
    said = f"{exact} of {len(values)} values to the last digit"
    near = len(values) - differing - exact
    if near:
        said += f", {near} within {tolerance:g} (relative)"
    return (
        f"Reproduced: {said}." if not differing else f"NOT reproduced: {differing} differ; {said}."
    )


def _show(
    console: Any, surroundings: Sequence[Sequence[str]], values: Sequence[Value], sentence: str
) -> None:
    differing = [value for value in values if not value.matches]
    parts = [surroundings, summary(values)]
    parts += [values_table(differing[:_SHOWN])] if differing else []
    for header, *rows in parts:
        if not rows:
            console.print("versions, commit, machine and texts are those of the recorded run")
            continue
        console.print(TurningTable.of([header, *rows]))
    if len(differing) > _SHOWN:
        console.print(f"and {len(differing) - _SHOWN} more")
    console.print(sentence, style="bold")


def _log(config: Config, run_id: str, recorded: str, sentence: str, texts: dict[str, str]) -> None:
    tracking = config.tracking
    tracker = Tracker.open(tracking.uri, tracking.experiment, tracking.artifacts)
    tracker.set_tags(run_id, {"reproduces": recorded, "mlflow.note.content": sentence})
    for name, text in texts.items():
        tracker.log_text(run_id, text, name)
