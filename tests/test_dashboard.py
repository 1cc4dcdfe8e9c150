"""optuna-dashboard opens the journal of a study, as docs/how_to.md says."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from kvsharer_exp.values.ports import free_port
from tests.search.test_study import Scorer, search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("optuna_dashboard") is None,
        reason="optuna-dashboard is not installed: pip install '.[dashboard]'",
    ),
]


def get(address: str, *, seconds: float = 60) -> Any:
    """What the server answers, once it does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urlopen(address, timeout=10) as answer:
                return json.load(answer)
        except URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_it_shows_every_trial_of_a_study(tmp_path: Path) -> None:
    found, trials, _ = search(tmp_path, Scorer(), 12)
    port = free_port()
    program = Path(sys.executable).with_name("optuna-dashboard")
    command = [str(program), str(tmp_path / "s.journal"), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            (study,) = get(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
            shown = get(f"http://127.0.0.1:{port}/api/studies/{study['study_id']}?after=0")
        finally:
            server.terminate()
    assert study["directions"] == ["minimize", "maximize"]
    assert len(shown["trials"]) == len(trials)
    values = [trial["values"] for trial in shown["trials"] if trial["state"] == "Complete"]
    scored = [[r.footprint.kv_fraction, r.score] for r in found if r.score is not None]
    assert all(value in values for value in scored)
