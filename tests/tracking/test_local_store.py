"""A store in a file: made whole by one process at a time, and found wherever its folder lies."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.main import main
from kvsharer_exp.tracking import store as store_module
from kvsharer_exp.tracking.runs import Runs
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap

NAME = "an experiment"


@pytest.fixture
def make_store(tmp_path: Path, store: list[str]) -> Callable[[str], Path]:
    """Make a folder with a database that has no runs; a copy, because making one takes seconds."""
    whole = Path(store[0].partition("=sqlite:///")[2])
    Tracker.open(f"sqlite:///{whole}", "any", str(whole.parent / "artifacts"))

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        shutil.copy(whole, folder / "mlflow.db")
        with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
            for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
                database.execute(f"delete from {table}")
        return folder

    return make


def opened(folder: Path, kind: type[Tracker] | type[Runs] = Tracker):
    return kind.open(f"sqlite:///{folder}/mlflow.db", NAME, str(folder / "artifacts"))


def a_run(folder: Path, text: str) -> str:
    tracker = opened(folder)
    run_id = tracker.start_run("a", tags={"command": "x"}, params={})
    tracker.log_text(run_id, text, "deep/x.txt")
    tracker.finish(run_id)
    return run_id


def text_of(folder: Path, run_id: str) -> str:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    target = folder / f"read-{run_id}"
    target.mkdir(exist_ok=True)
    return Path(client.download_artifacts(run_id, "deep/x.txt", str(target))).read_text()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("x.txt"))


OPEN = """
import sys
from kvsharer_exp.tracking.tracker import Tracker
tracker = Tracker.open("sqlite:///deep/mlflow.db", artifacts="deep/artifacts")
run = tracker.start_run("a", tags={}, params={})
tracker.log_text(run, "x", "x.txt")
tracker.finish(run)
"""


@pytest.mark.slow
def test_two_processes_may_make_one_store_at_once_also_after_a_kill(tmp_path: Path) -> None:
    """Public fault 7: one of the two failed, with advice that did not fit."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mlflow.db.new").write_bytes(b"left by a process that was killed")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(files(tmp_path)) == 2
    assert {path.name for path in (tmp_path / "deep").iterdir()} <= {
        *("mlflow.db", "mlflow.db.lock", "artifacts")
    }
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/deep/mlflow.db")
    experiment = client.get_experiment_by_name("kvsharer_exp").experiment_id
    assert len(client.search_runs([experiment])) == 2


def test_an_experiment_that_another_process_has_just_made_is_taken(make_store) -> None:
    """Public fault 7, on any store: both processes found no experiment, and both made it."""
    folder = make_store("a")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    made = client.create_experiment("both")
    assert store_module._make_experiment(client, "both", None).experiment_id == made


def test_the_folder_is_all_that_has_to_be_given(make_store, tmp_path: Path, monkeypatch) -> None:
    folder = make_store("kept")
    monkeypatch.chdir(tmp_path)
    words = ("model=tiny", "calibration.num_windows=2", "calibration.window_tokens=16")
    assert main(["calibrate", *words, "tracking.folder=kept", "hydra.run.dir=run", "-q"]) == 0
    run = json.loads(Path("run/result.json").read_text())["mlflow_run_id"]
    assert MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_run(run).info.status == "FINISHED"
    assert not Path("mlruns").exists()


def test_an_empty_file_is_no_store_yet(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    assert text_of(tmp_path, a_run(tmp_path, "made")) == "made"


@pytest.mark.parametrize("name", ["new", "ä folder/100 % é#"])
def test_a_store_that_was_moved_has_its_files_beside_it(make_store, tmp_path, name: str) -> None:
    """Public fault 8: files were looked for, and made anew, where the folder was before."""
    old, new = make_store("old"), tmp_path / name
    before = a_run(old, "before")
    tracker = opened(old)
    tracker.log_bytes(before, b"png", "front.png")
    tracker.log_map(before, SharingMap((0, 0)), {"kl": 0.5}, name="m")
    new.parent.mkdir(exist_ok=True)
    old.rename(new)
    pictures = opened(new, Runs).pictures(before)
    assert pictures == {"front.png": b"png"}
    assert text_of(new, before) == "before"
    after = a_run(new, "after")
    assert text_of(new, after) == "after"
    assert not old.exists()
    assert len(files(new / "artifacts")) == 2
    client = MlflowClient(tracking_uri=f"sqlite:///{new}/mlflow.db")
    model = client.get_run(before).outputs.model_outputs[0].model_id
    place = urlsplit(client.get_logged_model(model).artifact_location).path
    assert SharingMap.parse(Path(unquote(place)) / "map.json") == SharingMap((0, 0))


def test_every_experiment_of_a_store_moves_with_it(make_store, tmp_path: Path) -> None:
    old, new = make_store("old"), tmp_path / "new"
    run_id = a_run(old, "before")
    old.rename(new)
    Tracker.open(f"sqlite:///{new}/mlflow.db", "another", str(new / "artifacts"))
    assert text_of(new, run_id) == "before"


def test_a_copy_writes_into_its_own_folder(make_store, tmp_path: Path) -> None:
    one, two = make_store("one"), tmp_path / "two"
    run_id = a_run(one, "before")
    shutil.copytree(one, two)
    a_run(two, "in the copy")
    assert len(files(one / "artifacts")) == 1
    assert len(files(two / "artifacts")) == 2
    assert text_of(two, run_id) == text_of(one, run_id) == "before"


def test_files_that_lie_elsewhere_on_purpose_stay_there(make_store, tmp_path: Path) -> None:
    folder, far = make_store("a"), tmp_path / "far"
    uri = f"sqlite:///{folder}/mlflow.db"
    tracker = Tracker.open(uri, NAME, str(far))
    run_id = tracker.start_run("a", tags={}, params={})
    tracker.log_text(run_id, "far", "deep/x.txt")
    other = Tracker.open(uri, NAME, str(folder / "artifacts"))
    other.log_text(run_id, "again", "deep/y.txt")
    assert text_of(folder, run_id) == "far"
    assert not (folder / "artifacts").exists()


def test_a_run_that_an_earlier_version_wrote_to_the_old_place_is_found_there(
    make_store, tmp_path: Path
) -> None:
    old, new = make_store("old"), tmp_path / "new"
    run_id = a_run(old, "before")
    shutil.copytree(old, new)
    place = f"{(old / 'artifacts' / NAME).as_uri()}/"
    with closing(sqlite3.connect(new / "mlflow.db")) as database, database:
        database.execute(
            "insert into runs (run_uuid, experiment_id, status, lifecycle_stage, artifact_uri, "
            "name, source_type, start_time, user_id) select 'later', experiment_id, status, "
            "lifecycle_stage, ?, name, source_type, start_time, user_id from runs",
            [f"{place}later/artifacts"],
        )
    written = old / "artifacts" / NAME / "later" / "artifacts" / "deep" / "x.txt"
    written.parent.mkdir(parents=True)
    written.write_text("later")
    opened(new)
    assert text_of(new, "later") == "later"
    assert text_of(new, run_id) == "before"


def test_a_store_that_was_moved_without_its_files_is_one_line(make_store, tmp_path: Path) -> None:
    old, new = make_store("old"), tmp_path / ("long" * 40)
    a_run(old, "before")
    new.mkdir()
    (old / "mlflow.db").rename(new / "mlflow.db")
    opened(new)  # the files are still where they were
    shutil.rmtree(old)
    with pytest.raises(InputError, match="which is gone: put them in ") as refused:
        opened(new)
    assert len(str(refused.value)) <= 200
    assert not old.exists()
    (new / "artifacts" / NAME).mkdir(parents=True)
    assert text_of(new, a_run(new, "after")) == "after"
    assert not old.exists()


def test_the_place_of_a_server_is_left_alone(make_store) -> None:
    folder = make_store("a")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    client.create_experiment(NAME, artifact_location="s3://bucket/x")
    opened(folder)
    assert client.get_experiment_by_name(NAME).artifact_location == "s3://bucket/x"


def test_a_view_of_json_is_no_place(make_store, tmp_path: Path) -> None:
    """Only places are rewritten: a tag that holds the old path keeps it."""
    old, new = make_store("old"), tmp_path / "new"
    run_id = a_run(old, "x")
    opened(old).set_tags(run_id, {"said": json.dumps({"at": str(old)})})
    old.rename(new)
    opened(new)
    client = MlflowClient(tracking_uri=f"sqlite:///{new}/mlflow.db")
    assert json.loads(client.get_run(run_id).data.tags["said"]) == {"at": str(old)}
