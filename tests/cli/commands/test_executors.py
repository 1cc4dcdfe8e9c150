"""``sweep`` with an executor: the same front from workers, and what is refused beforehand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hydra import compose, initialize_config_dir

from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.commands import sweep as sweep_command
from kvsharer_exp.cli.config.compose import register, to_config
from kvsharer_exp.cli.config.executor import ExecutorConfig
from kvsharer_exp.cli.config.model import ModelConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps import executors, sweep_worker
from kvsharer_exp.cli.steps.plan_candidates import fits_of
from kvsharer_exp.cli.steps.sweep_setup import identity_of
from kvsharer_exp.measure.fits import Fits
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.search.execution import ray_cluster
from kvsharer_exp.search.outcome import Bar
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from tests.cli.session.test_killed_sweeps import QUICK
from tests.refusals import check_refusal
from tests.search import cheap


def front_of(folder: str) -> list[tuple[str, float]]:
    found = json.loads(Path(folder, "result.json").read_text())
    return [(entry["plan"], entry["scores"]["kl"]) for entry in found["front"]]


@pytest.mark.slow
def test_a_worker_gives_the_front_of_this_process(tmp_path: Path, store, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_command, "keep_files", lambda *_: None)  # pictures take seconds
    threads = os.environ.get("OMP_NUM_THREADS")
    for name, words in (("local", ()), ("there", ("executor=processes", "executor.num_workers=1"))):
        folder = [f"study.name={tmp_path.name}-{name}", f"hydra.run.dir={name}"]
        assert main(["sweep", *QUICK, *store, *words, *folder]) == 0
    here, there = front_of("local"), front_of("there")
    assert [plan for plan, _ in there] == [plan for plan, _ in here]
    exact = 0.0 if threads == "1" else 1e-4  # a worker has threads of its own
    assert [kl for _, kl in there] == pytest.approx([kl for _, kl in here], rel=exact, abs=1e-9)
    assert (tmp_path / "there" / "workers" / "worker-0.log").read_text()
    assert not (tmp_path / "local" / "workers").exists()


REFUSALS = {
    "executor.num_workers=2": "executor.num_workers is for workers: give executor=processes",
    "executor.trial_timeout=9": "executor.trial_timeout is for workers",
    "executor=processes executor.address=h:1": "executor.address is for a Ray cluster",
    "executor=processes executor.num_workers=0": "executor.num_workers=0: give at least 1",
    "executor=ray executor.num_cpus=0": "executor.num_cpus=0: give CPUs above 0",
    "executor=ray executor.num_cpus=0.00001": "executor.num_cpus=1e-05: give CPUs above 0",
    "executor=ray executor.num_gpus=-1": "executor.num_gpus=-1: give 0, a share of at least",
    "executor=ray executor.num_gpus=0.00001": "executor.num_gpus=1e-05: give 0",
    "executor=ray executor.num_gpus=1.5": "executor.num_gpus=1.5: give 0, a share",
    "executor=processes executor.trial_timeout=1e12": "executor.trial_timeout=1e+12: give seconds",
    "executor=ray executor.trial_timeout=0": "executor.trial_timeout=0: give seconds above 0",
    "executor=processes scoring.maps_per_forward=2": "scoring.maps_per_forward=2: a worker takes",
    "executor=proceses": "did you mean processes",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_cannot_be_is_refused_in_a_line(words: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "model=tiny", *words.split(), "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, REFUSALS[words])


def test_other_commands_have_no_executor(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "model=tiny", "executor=processes", "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, "evaluate knows no executor=processes: give it to sweep")


def test_more_workers_than_memory_are_refused_before_the_search(
    tmp_path: Path, store, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    free = psutil.virtual_memory()._replace(available=3 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    words = ["executor=processes", "executor.num_workers=3", f"study.name={tmp_path.name}"]
    assert main(["sweep", *QUICK, *store, *words, "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, "executor.num_workers=3: each needs 1.0 GiB")
    assert not (tmp_path / "run" / "workers").exists()


def config(**wanted: Any) -> Config:
    return Config(
        command="sweep",
        model=ModelConfig(name="tiny", source="random:tiny"),
        executor=ExecutorConfig(**wanted),
    )


GIB = 1 << 30
SMALL: Any = SimpleNamespace(model=torch.nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("free", "fits"),
    [([0.5, 2.5, 3.5], 2), ([1.5, 2.5, 3.5], 5), ([2.5, 9.5], 5), ([1.5, 0.5], 0), ([3.5], 3)],
)
def test_the_workers_that_are_accepted_fit_on_the_gpus_they_get(
    free: list[float], fits: int, monkeypatch
) -> None:
    """GPU 0 also holds the model of this process. Each worker needs a little more than 1 GiB."""
    names = [str(index) for index in range(len(free))]
    monkeypatch.setattr(executors, "_gpus", lambda: names)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index] * GIB, 99 * GIB))
    places = executors._environments(fits)
    given = Counter(
        int(places[number % len(places)]["CUDA_VISIBLE_DEVICES"]) for number in range(fits)
    )
    assert all(count < free[index] for index, count in given.items())
    if fits:
        executors.require_memory(config(name="processes", num_workers=fits), SMALL)
    with pytest.raises(InputError, match=f"there is memory for {fits}: ") as refused:
        executors.require_memory(config(name="processes", num_workers=fits + 1), SMALL)
    check_refusal(f"kvsharer: {refused.value}", "use a smaller model.dtype")
    assert ("give at most" in str(refused.value)) == (fits > 0)


@pytest.mark.parametrize(("trial", "start"), [(None, None), (5.0, 3600.0), (7200.0, 7200.0)])
def test_a_worker_process_has_an_hour_to_load_or_as_long_as_a_plan(
    trial: float | None, start: float | None, tmp_path: Path, monkeypatch
) -> None:
    limits: list[tuple[Any, Any]] = []

    @contextmanager
    def pool(*_: object, trial_timeout: object, start_timeout: object, **__: object):
        limits.append((trial_timeout, start_timeout))
        yield

    monkeypatch.setattr(executors, "Pool", pool)
    log: Any = SimpleNamespace(folder=tmp_path, say=lambda text: None)
    asked = config(name="processes", trial_timeout=trial)
    with executors.open_executor(asked, log, SMALL, None, {}, {}):  # type: ignore[arg-type]
        assert limits == [(trial, start)]


@pytest.mark.parametrize(
    ("nodes", "wanted", "names"),
    [
        (  # together they have the GPUs; Ray would wait for one node that has them all
            [{"CPU": 8.0, "GPU": 1.0}] * 4,
            {"num_gpus": 4.0},
            "no node of the Ray cluster (4 in all) has 1 CPUs and 4 GPUs",
        ),
        (  # so are two nodes of half the memory
            [{"CPU": 8.0, "memory": 1.5 * GIB}, {"CPU": 8.0, "memory": 2.5 * GIB}],
            {"num_workers": 4},
            "executor.num_workers=4: each needs 1.0 GiB, and there is memory for 3: give at most 3",
        ),
        (  # one node has the CPUs, and the other one the memory
            [{"CPU": 8.0, "memory": 0.5 * GIB}, {"memory": 9 * GIB}],
            {},
            "executor.num_workers=1: each needs 1.0 GiB, and there is memory for 0: leave executor",
        ),
    ],
    ids=["gpus", "memory", "no-memory"],
)
def test_a_cluster_whose_nodes_are_too_small_is_refused(
    nodes, wanted: dict[str, Any], names: str, tmp_path: Path, monkeypatch
) -> None:
    @contextmanager
    def cluster(address: str | None):
        yield nodes

    monkeypatch.setattr(ray_cluster, "cluster", cluster)
    log: Any = SimpleNamespace(folder=tmp_path, say=lambda text: None)
    asked = config(name="ray", **wanted)
    with pytest.raises(InputError) as refused:
        with executors.open_executor(asked, log, SMALL, None, {}, {}):  # type: ignore[arg-type]
            pass
    check_refusal(f"kvsharer: {refused.value}", names)


@pytest.fixture
def asked_in_a_folder(tmp_path: Path, monkeypatch) -> tuple[Config, dict[str, Any], Fits]:
    """A sweep of plans whose text is a file of its own folder, as it is when workers start."""
    lines = [
        f"The {n}th day of the year was {n % 7} hours long and {n} miles wide." for n in range(999)
    ]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("\n".join(lines))
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    register(data_dir("search_spaces"))
    words = [*QUICK, "calibration.path=mine.txt", "heldout.path=mine.txt"]
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        asked = to_config(compose("config", translate(["sweep", *words])))
    log: Any = sweep_worker.WorkerLog()
    loaded = LoadedModel(asked, log)
    windows = Windows(asked, loaded)
    identity = identity_of(asked, loaded, windows, plans=True)
    return asked, identity, fits_of(asked, loaded, Plans(asked, log, loaded, windows))


def test_a_worker_in_another_folder_reads_the_files_of_the_sweeps(
    asked_in_a_folder, tmp_path, monkeypatch
) -> None:
    """An actor of Ray works where Ray was started."""
    settings = sweep_worker.settings_of(*asked_in_a_folder)
    monkeypatch.chdir(tmp_path / "there")
    score = sweep_worker.make_score(settings)
    assert score(KVPlan.full(6), Bar()).status == "complete"


def test_a_worker_whose_fits_are_not_those_of_the_sweep_is_refused(asked_in_a_folder) -> None:
    asked, identity, fits = asked_in_a_folder
    layer, action = key = max(fits, key=str)
    moved = {name: tensor + 1 for name, tensor in fits[key].tensors.items()}
    settings = sweep_worker.settings_of(
        asked, identity, {**fits, key: replace(fits[key], tensors=moved)}
    )
    with pytest.raises(InputError) as refused:
        sweep_worker.make_score(settings)
    named = (
        f"another fit for {action.text(layer)} of layer {layer} than the sweep (1 of {len(fits)}"
    )
    check_refusal(f"kvsharer: {refused.value}", named)


STOPPED = """
import sys
from pathlib import Path
from kvsharer_exp.cli.stopping import finishing
from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.study import open_study
from tests.search import cheap
folder = Path(sys.argv[1])
with open_study("s", storage=None, folder=folder) as store:
    with Pool(cheap.crew(folder, seconds=1.5), 2) as pool, finishing(print) as is_asked:
        print("searching", flush=True)
        run_search(store, cheap.search(), pool, n_trials=100, is_stopped=is_asked)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_finishes_what_is_under_way_and_twice_does_not(tmp_path, times: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=cheap.ROOT)
    log = tmp_path / "scored.txt"
    while not log.exists() or len(cheap.scored(tmp_path)) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(10) == (0 if times == 1 else -signal.SIGINT)
    with open_study("s", storage=None, folder=tmp_path) as store:
        assert len(store.results()) == (2 if times == 1 else 0)
        assert len(store.under_way()) == 2
    assert len(cheap.scored(tmp_path)) == 2
