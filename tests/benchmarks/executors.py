"""What workers buy, and what they cost: the same plans scored by every executor, in one run.

    python tests/benchmarks/executors.py --plans 24 --out docs/results/executors

All executors stand ready at once: this process, one and two worker processes, and one Ray worker,
with one thread a worker. Each scores the same four plans, then the next four, in an order that
turns. So what is compared was measured within seconds, whatever else the machine does. Speed is the
median ratio to one worker process, and the overhead of an executor the median of its time a plan
less that of this process.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from hydra import compose, initialize_config_dir

from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.config.compose import register, to_config
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.sweep_setup import identity_of
from kvsharer_exp.cli.steps.sweep_worker import MAKE, WorkerLog, make_score, settings_of
from kvsharer_exp.measure.machine import settle
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.search.execution.base import Executor, Task
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.execution.processes import ProcessCrew
from kvsharer_exp.search.execution.ray_cluster import RayCrew, cluster
from kvsharer_exp.search.outcome import Bar
from kvsharer_exp.values.plan import KVPlan
from tests.benchmarks.kept import keep_results

_TOGETHER = 4  # plans, so that two workers end at about the same time


def configured(words: Sequence[str]) -> Config:
    register(data_dir("search_spaces"))
    with initialize_config_dir(config_dir=str(data_dir("conf")), version_base="1.3"):
        return to_config(compose("config", translate(["sweep", *words])))


def plans_of(num_layers: int, count: int) -> list[KVPlan]:
    """Plans that begin to differ from the full cache at layers all over the model."""
    full, found = KVPlan.full(num_layers), []
    for number in range(count):
        layer = 1 + number * 7 % (num_layers - 1)
        text = full.texts
        changed = [*text[:layer], ("x", "0", f"{layer}q4")[number % 3], *text[layer + 1 :]]
        found.append(KVPlan.parse("_".join(changed)))
    return found


def ready(executor: Executor, count: int, plan: KVPlan) -> Executor:
    """The executor once all ``count`` workers are ready, and each has scored a plan."""
    while executor.room < count:
        executor.wait()
    _finish(executor, [Task(-1 - number, plan, Bar()) for number in range(count)])
    return executor


def seconds_for(executor: Executor, plans: Sequence[KVPlan]) -> float:
    """The seconds a plan."""
    started = time.perf_counter()
    _finish(executor, [Task(number, plan, Bar()) for number, plan in enumerate(plans)])
    return (time.perf_counter() - started) / len(plans)


def _finish(executor: Executor, tasks: list[Task]) -> None:
    waiting, under_way = list(tasks), 0
    while waiting or under_way:
        while waiting and executor.room:
            executor.submit([waiting.pop(0)])
            under_way += 1
        for done in executor.wait():
            assert done.outcome.status == "complete", done.outcome.reason
            under_way -= 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--words", nargs="*", default=["model=smollm2", "model.dtype=bfloat16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settle()
    tasks = ["scoring.search.tasks=[]", "search_space.options.actions=[own,q4g128s4,x,read]"]
    config = configured([*options.words, *tasks])
    log: Any = WorkerLog()
    loaded = LoadedModel(config, log)
    identity = identity_of(config, loaded, Windows(config, loaded), plans=True)
    settings = settings_of(config, identity, {})  # no action here is fitted
    plans = plans_of(loaded.num_layers, options.plans)

    @contextmanager
    def local() -> Iterator[Executor]:
        yield LocalExecutor(make_score(settings))

    @contextmanager
    def processes(count: int) -> Iterator[Executor]:
        with tempfile.TemporaryDirectory() as folder:
            crew = ProcessCrew(MAKE, settings, folder=Path(folder))
            with Pool(crew, count) as pool:
                yield pool

    @contextmanager
    def ray() -> Iterator[Executor]:
        with cluster("local"):
            with Pool(RayCrew(MAKE, settings, num_cpus=1, num_gpus=0), 1) as pool:
                yield pool

    kinds: dict[str, tuple[int, Callable[[], Any]]] = {
        "local": (1, local),
        "one process": (1, lambda: processes(1)),
        "two processes": (2, lambda: processes(2)),
        "one Ray worker": (1, ray),
    }
    measured: dict[str, list[float]] = {name: [] for name in kinds}
    with ExitStack() as stack:
        executors = [
            (name, ready(stack.enter_context(make()), count, plans[0]))
            for name, (count, make) in kinds.items()
        ]
        for turn, start in enumerate(range(0, len(plans), _TOGETHER)):
            for place in range(len(executors)):
                name, executor = executors[(turn + place) % len(executors)]
                seconds = seconds_for(executor, plans[start : start + _TOGETHER])
                measured[name].append(seconds)
                sys.stdout.write(f"{name}: {seconds:.3f} s a plan\n")
                sys.stdout.flush()
    lines = [
        "| executor | s a plan | plans a minute / one process | overhead over local, ms a plan |",
        "| --- " * 4 + "|",
    ]
    for name, seconds in measured.items():
        each = list(zip(seconds, measured["one process"], measured["local"], strict=True))
        ratio = median(one / own for own, one, _ in each)
        more = 1000 * median(own - local for own, _, local in each)
        overhead = "" if name == "two processes" else f"{more:.0f}"
        lines.append(f"| {name} | {median(seconds):.3f} | {ratio:.2f} | {overhead} |")
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    keep_results(options.out, "executors", table, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
