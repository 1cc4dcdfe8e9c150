"""The command ``status``: how the studies of this store stand, without disturbing them.

Without ``study=NAME`` it tells of all studies whose locks are in ``tracking.folder``; in full of
those that run, and else of the one that ran last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.result_file import head, write_result
from kvsharer_exp.cli.terminal import make_console
from kvsharer_exp.reporting.plan_kinds import kv_percent, size_words
from kvsharer_exp.search.study_status import StudyStatus, status_of, studies_in
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.score_names import KL
from kvsharer_exp.values.text import clip

_SHOWN = 6  # rungs and failures
_PLAN = 60  # characters


def run(config: Config) -> None:
    """Print how each study stands, and write ``result.json``."""
    folder, console = Path(config.tracking.folder) / "studies", make_console()
    started = time.perf_counter()
    names = [config.study.name] if config.study.name else studies_in(folder)
    if not names:
        raise InputError(f"there is no study in {folder}: run kvsharer sweep")
    found = [status_of(name, folder=folder, storage=config.study.storage) for name in names]
    running = [status for status in found if status.owner]
    for status in found:
        in_full = status in running or (not running and status is found[0])
        for line in _lines(status) if in_full else [_head(status)]:
            console.print(line, markup=False, soft_wrap=True)
    seconds = time.perf_counter() - started
    result = {
        **head(config, model=None, seconds=seconds, mlflow_run_id=None, versions=environment()),
        "studies": [status.to_dict() for status in found],
    }
    path = Path(HydraConfig.get().runtime.output_dir)
    write_result(path, result)
    console.print(f"\nresult   {path / 'result.json'}", markup=False)


def _head(status: StudyStatus) -> str:
    state = f"run by {status.owner}" if status.owner else "not running"
    return f"{status.study}   {state}   {_counted(status)}"


def _counted(status: StudyStatus) -> str:
    counts = status.counts
    words = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in sorted(counts.items()))
    of = f" of {status.n_trials}" if status.n_trials else ""
    return f"{len(status.results)}{of} plans" + (f" ({words})" if words else "")


def _lines(status: StudyStatus) -> Iterator[str]:
    yield _head(status)
    if status.owner and status.per_minute is not None:
        left = status.seconds_left
        end = "" if left is None else f", about {_minutes(left)} to the end of the search"
        yield f"  {status.per_minute:.1f} plans a minute{end}"
    for number, worker in enumerate(status.to_dict()["workers"]):
        plan = clip(worker["plan"], _PLAN)
        doing = f" for {worker['seconds']:.0f} s with {plan}" if plan else ""
        yield f"  worker {number}: {worker['state']}{doing}"
    for reason, count in list(status.reasons.items())[:_SHOWN]:
        yield f"  failed: {count} × {reason}"
    best = list(status.best.values())
    shown = best[:: max(1, -(-len(best) // _SHOWN))]
    if len(shown) < len(best):
        yield f"  the best of {len(shown)} of {len(best)} sizes:"
    for result in shown:
        kept = kv_percent(result.footprint.kv_fraction, fine=True)
        yield f"  best: {kept:>6} of KV   kl {result.scores[KL]:.3g}   {size_words(result.plan)}"
    if not status.owner and len(status.results) < (status.n_trials or math.inf):
        yield "  the command that began this study continues it"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
