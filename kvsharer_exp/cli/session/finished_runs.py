"""Find the finished runs that ``run=`` names, by MLflow run id or by run folder.

The commands ``report`` and ``reproduce`` read their runs here. Whatever is wrong with a run is said
here, before anything is computed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.result_file import SCHEMA
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.tracking.run_plans import run_and_choice
from kvsharer_exp.tracking.runs import Runs, StoredRun
from kvsharer_exp.tracking.store import require_store
from kvsharer_exp.values.errors import MALFORMED, InputError
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_json, read_text, why_unreadable


def names_of(config: Config) -> list[str]:
    """The names that ``run=`` holds, each once; empty if ``run=`` is not given.

    Raises:
        InputError: ``run=`` is neither a text nor a list of texts.
    """
    if config.run is None:
        return []
    given = config.run if isinstance(config.run, list) else [config.run]
    names = ["" if isinstance(name, (list, dict)) else str(name).strip() for name in given]
    if not names or not all(names):
        raise InputError(f"run={shorten(config.run)}: give MLflow run ids or run folders")
    return list(dict.fromkeys(names))


def require_runs(config: Config) -> None:
    """Refuse to read a run where there is no store, before the command makes one.

    Raises:
        InputError: ``plan=``, ``map=``, ``compare=`` or ``run=`` names a run by its id, or a budget
            asks for the newest sweep, and there is no store yet.
    """
    wanted, names = config.compression, names_of(config)
    by_id = any(run_and_choice(value) for value in (config.plan, config.map, config.compare))
    budgets = wanted.kv is not None or wanted.kv_gib is not None
    newest_sweep = config.command == "plan" and budgets and not names
    if by_id or newest_sweep or not all(Path(name).is_dir() for name in names):
        require_store(config.tracking.uri)


def open_runs(config: Config, names: Sequence[str]) -> Runs:
    """Open the runs of the store.

    Raises:
        InputError: there is no store yet, and not all ``names`` are folders.
    """
    tracking = config.tracking
    if not names or not all(Path(name).is_dir() for name in names):
        require_store(tracking.uri)
    return Runs.open(tracking.uri, tracking.experiment, tracking.artifacts)


def finished_run(runs: Runs, name: str, kinds: Collection[str]) -> FinishedRun:
    """The run called ``name``, which is an MLflow run id or a run folder.

    Raises:
        InputError: there is no such run, or it has not finished, has no ``result.json``, was made
            with another schema, or is of a kind that is not in ``kinds``.
    """
    folder = Path(name)
    if folder.is_dir():
        result = _result(_read(folder / "result.json"), f"folder {shorten(name, 80)}")
        check_kind(result, name, kinds)
        stored = runs.find(str(result.get("mlflow_run_id")))
        recorded = runs.text(stored.run_id, "config.yaml") if stored else None
        pictures = {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}
        config = _config(recorded or _read(folder / ".hydra" / "config.yaml"))
        return FinishedRun(result, config, stored.url if stored else "", pictures, name)
    found = runs.find(name)
    if found is None:
        raise _unknown(runs, name)
    _check_finished(found)
    text = runs.text(found.run_id, "result.json")
    if text is None:
        raise _without_result(found)
    result = _result(text, f"run {name}")
    check_kind(result, name, kinds)
    config = _config(runs.text(found.run_id, "config.yaml"))
    return FinishedRun(result, config, found.url, runs.pictures(found.run_id), name)


def newest(runs: Runs, kinds: Collection[str], most: int) -> list[StoredRun]:
    """The newest finished run of every command, model, experiment and map; at most ``most`` runs.

    Raises:
        InputError: the store has no finished run of ``kinds``.
    """
    chosen: dict[tuple[str, ...], StoredRun] = {}
    for run in runs.recent():
        if run.status == "FINISHED" and run.command in kinds:
            chosen.setdefault((run.command, run.model, run.experiment, run.digest), run)
    if not chosen:
        raise InputError(
            f"no finished run in this store: run one of {', '.join(kinds)} first, "
            "or check tracking.uri"
        )
    return list(chosen.values())[:most]


def check_kind(result: Mapping[str, Any], name: str, kinds: Collection[str]) -> None:
    """Refuse the ``result`` of a run that is not of ``kinds``.

    Raises:
        InputError: it is of another kind.
    """
    kind = result.get("command")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"run {shorten(name, 60)} is of kind {clip(repr(kind), 20)}: "
            f"give a run of {', '.join(kinds)}"
        )


def _result(text: str | None, what: str) -> dict[str, Any]:
    """Read a ``result.json``; it must have the schema that this version writes."""
    if text is None:
        raise InputError(f"{what} has no result.json: give the folder of a run that has finished")
    try:
        result = read_json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{what} has a result.json that is no JSON: run it again") from error
    schema = result.get("schema", 0) if isinstance(result, dict) else 0
    if isinstance(schema, bool) or not isinstance(schema, int):
        raise InputError(
            f"{what} has a result.json of schema {clip(repr(schema), 30)}: run it again"
        )
    if schema < SCHEMA:
        command = result.get("command", "COMMAND") if isinstance(result, dict) else "COMMAND"
        raise InputError(
            f"{what} was made with schema {schema}, this version reads {SCHEMA}: run it again "
            f"(kvsharer {command} …)"
        )
    if schema > SCHEMA:
        raise InputError(
            f"{what} was made with schema {schema}, this version reads {SCHEMA}: "
            "use the newer kvsharer_exp that made it"
        )
    return dict(result)


def _unknown(runs: Runs, name: str) -> InputError:
    near = runs.closest(name)
    hint = f"did you mean {near}?" if near else "check tracking.uri, or give a run folder"
    return InputError(f"run {shorten(name, 60)} is not in this store: {hint}")


def _check_finished(run: StoredRun) -> None:
    if run.status in ("RUNNING", "SCHEDULED"):
        raise InputError(f"run {run.run_id} has not finished ({run.status}): wait until it has")
    if run.status != "FINISHED":
        raise InputError(f"run {run.run_id} ended as {run.status}: run it again, or give another")


def _without_result(run: StoredRun) -> InputError:
    if run.parent_id:
        return InputError(
            f"run {run.run_id} is one map of run {run.parent_id} and has no result.json: "
            "give that run"
        )
    return InputError(f"run {run.run_id} has no result.json: give a run of a kvsharer command")


def _read(path: Path) -> str | None:
    """The text of a file; None if it is not there.

    Raises:
        InputError: it is no text.
    """
    try:
        return read_text(path) if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{shorten(path)} cannot be read ({why_unreadable(error)}): give another run, or run "
            "it again"
        ) from error


def _config(text: str | None) -> dict[str, Any]:
    """The configuration as it was recorded; empty if it was not.

    Raises:
        InputError: it is no YAML.
    """
    try:
        held = OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=False)
    except (YAMLError, OmegaConfBaseException, *MALFORMED) as error:
        raise InputError(
            f"the recorded configuration cannot be read ({clip(str(error), 60)}): run it again"
        ) from error
    return {str(key): value for key, value in held.items()} if isinstance(held, dict) else {}
