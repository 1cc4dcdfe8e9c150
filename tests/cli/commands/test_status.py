"""The command ``status``: what it says of studies that run, that ended, and that are not there."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvsharer_exp.cli.commands import sweep as sweep_command
from kvsharer_exp.cli.main import main
from kvsharer_exp.search import study_status
from kvsharer_exp.search.study_status import Progress, watched
from kvsharer_exp.values.errors import InputError
from tests.cli.session.test_killed_sweeps import QUICK
from tests.refusals import check_refusal
from tests.search.cheap import ROOT

WATCHED = """
import sys, time
from pathlib import Path
from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.study import open_study
from kvsharer_exp.search.study_status import Progress, watched
from tests.search import cheap
folder, began = Path(sys.argv[1]), time.time()
with open_study("watched", storage=None, folder=folder) as store:
    with Pool(cheap.crew(folder, fails=[1, 2], hangs=[6]), 2) as pool:
        told = lambda: Progress(None, began, time.time(), 0, 50, None, pool.workers)
        with watched(folder, "watched", told):
            run_search(store, cheap.search(), pool, n_trials=20)
            print("searched", flush=True)
"""


@pytest.mark.slow
def test_a_sweep_that_ended(tmp_path: Path, store: list[str], monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_command, "keep_files", lambda *_: None)  # pictures take seconds
    assert main(["sweep", *QUICK, *store, "study.name=ended", "hydra.run.dir=run"]) == 0
    swept = json.loads(Path("run/result.json").read_text())
    capsys.readouterr()
    assert main(["status", "study=ended", *store, "hydra.run.dir=status"]) == 0
    said = capsys.readouterr().out
    (found,) = json.loads(Path("status/result.json").read_text())["studies"]
    assert found["running"] == ""
    assert found["trials"] == {k: n for k, n in swept["trials"].items() if n and k != "cached"}
    assert found["n_trials"] == 8
    dearest = max((e for e in swept["front"]), key=lambda e: e["kv_fraction"])
    assert dearest["plan"] in [best["plan"] for best in found["best"]]  # it scores highest of all
    assert "ended   not running   8 of 8 plans" in said
    assert "best:" in said
    assert "continues it" not in said


def test_a_search_with_a_worker_that_hangs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mlruns" / "studies"
    folder.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", WATCHED, str(folder)], cwd=ROOT)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            time.sleep(1)
            if not (folder / "watched.progress.json").is_file():
                continue
            assert main(["status", "tracking.folder=mlruns", "hydra.run.dir=status"]) == 0
            (found,) = json.loads(Path("status/result.json").read_text())["studies"]
            states = [worker["state"] for worker in found["workers"]]
            if sum(found["trials"].values()) == 19 and states.count("busy") == 1:
                break
    finally:
        process.kill()
        process.wait()
    said = capsys.readouterr().out
    assert found["running"].startswith(f"process {process.pid} of ")
    assert found["trials"] == {"complete": 17, "failed": 2}
    assert found["failures"] == {"RuntimeError: out of memory": 2}
    assert found["trials_per_minute"] > 0
    (busy,) = [worker for worker in found["workers"] if worker["state"] == "busy"]
    assert busy["seconds"] > 0.5 and len(found["workers"]) == 2
    assert f"busy for {busy['seconds']:.0f} s with {busy['plan']}" in said
    assert "failed: 2 × RuntimeError: out of memory" in said
    assert main(["status", "tracking.folder=mlruns", "hydra.run.dir=killed"]) == 0
    said = capsys.readouterr().out
    assert "watched   not running   19 of 50 plans" in said
    assert "the command that began this study continues it" in said
    assert re.search(r"best: +[\d.]+ ?% of KV   kl \d", said)


def test_a_full_disk_neither_ends_a_search_nor_hides_how_it_ended(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    """The thread died with a traceback, and Ctrl-C became a failure."""

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(study_status, "write_atomically", full)
    monkeypatch.setattr(study_status, "_EVERY", 0.01)
    asked = threading.Event()

    def progress() -> Progress:
        asked.set()
        return Progress(None, 0.0, 1.0, 0, None, None)

    with pytest.raises(KeyboardInterrupt):
        with watched(tmp_path, "full", progress):
            asked.clear()
            assert asked.wait(60)
            raise KeyboardInterrupt
    (said,) = caplog.messages
    assert (
        said == "the progress of study full cannot be written: [Errno 28] No space left on device"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no study in mlruns/studies: run kvsharer sweep"),
        (("study=absent",), "there is no study absent in mlruns/studies/absent.journal: check"),
    ],
)
def test_studies_that_are_not_there(words, message: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["status", *words, "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, message)
    assert not (tmp_path / "mlruns").exists()


def test_a_name_that_is_nearly_that_of_a_study(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mlruns" / "studies"
    folder.mkdir(parents=True)
    (folder / "first-sweep.lock").touch()
    assert main(["status", "study=first-swep", "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, "did you mean first-sweep?")


def test_a_count_that_no_rate_can_be_made_of_is_damage(tmp_path: Path) -> None:
    """Found by ten thousand examples of tests/fuzz: it ended with an OverflowError."""
    good = {"storage": None, "began": 0.0, "written": 60.0, "known": 10**400}
    good |= {"n_trials": None, "until": None, "workers": []}
    (tmp_path / "s.progress.json").write_text(json.dumps(good))
    with pytest.raises(InputError, match=r"s\.progress\.json is damaged.*remove it"):
        Progress.read(tmp_path, "s")
