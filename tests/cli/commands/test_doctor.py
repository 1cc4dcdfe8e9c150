"""What the doctor says is what is there: caches, hub, stores, made for each test."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvsharer_exp.cli.commands import doctor
from kvsharer_exp.cli.main import main
from kvsharer_exp.model.assets import ASSETS, asset_path
from kvsharer_exp.model.availability import converted_folder, in_hub_cache, weight_bytes
from kvsharer_exp.model.folders import data_dir

MADE = "key_value, multi_key, needle, wiki_cloze, wiki_next, wiki_ppl"
MODELS = {path.stem for path in data_dir("conf").glob("model/*.yaml")}


class Hub(BaseHTTPRequestHandler):
    """A hub that has every model but one, and wants a licence for Llama."""

    def do_GET(self) -> None:
        refusals = {"meta-llama": (403, "GatedRepo"), "Qwen3": (404, "RepoNotFound")}
        found = [refusal for name, refusal in refusals.items() if name in self.path]
        status, reason = found[0] if found else (200, "")
        self.send_response(status)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def consult(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run ``doctor`` here, with an empty cache and a hub nobody answers for."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVSHARER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def call(*arguments: str) -> dict:
        assert main(["doctor", f"hydra.run.dir={tmp_path}/run", *arguments]) == 0
        return json.loads((tmp_path / "run" / "result.json").read_text())

    return call


def checks(result: dict, section: str) -> dict[str, tuple[bool, str]]:
    return {check["what"]: (check["works"], check["note"]) for check in result[section]}


def test_offline_it_tells_what_works_and_writes_only_its_result(
    consult, tmp_path: Path, capsys
) -> None:
    started = time.perf_counter()
    result = consult()
    assert time.perf_counter() - started < 10
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert (result["schema"], result["command"], result["seed"]) == (1, "doctor", 0)
    assert result["versions"]["torch"] != "not installed"
    models = checks(result, "models")
    assert models.keys() == MODELS
    assert models["tiny"] == (True, "ready")
    works, note = models["smollm2"]
    assert works and "93 MB" in note
    works, note = models["llama3_1_8b"]
    assert not works and ("model hub" in note or "larger machine" in note)
    ((works, note),) = checks(result, "hub").values()
    assert not works and "HF_ENDPOINT" in note
    assert all(works for works, _ in checks(result, "machine").values())
    tasks = checks(result, "tasks")
    assert tasks[MADE][0]
    assert "28 MB" in tasks[MADE][1]
    assert tasks["copying, sums, variables"][0]
    (foreign,) = (what for what in tasks if "hellaswag" in what)
    assert not tasks[foreign][0]
    shown = capsys.readouterr().out
    for text in ("mistral", "hellaswag", "kvsharer sweep model=smollm2", "result.json"):
        assert text in shown


def test_what_is_cached_is_ready(consult, tmp_path: Path) -> None:
    converted = converted_folder("smollm2", ASSETS["smollm2"].sha256)
    converted.mkdir(parents=True)
    for asset in ("gemma3_270m", "wikipedia"):
        asset_path(asset).parent.mkdir(parents=True)
        asset_path(asset).touch()
    for name, files in {
        "mistralai--Mistral-7B-Instruct-v0.3": ("config.json", "model.safetensors"),
        "internlm--internlm2-chat-7b": ("config.json",),
    }.items():
        snapshot = tmp_path / "hub" / f"models--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        for file in files:
            (snapshot / file).touch()
    (tmp_path / "hub" / "datasets--ybisk--piqa").mkdir()
    result = consult()
    models = checks(result, "models")
    assert {n for n, (_, note) in models.items() if note == "ready"} >= {
        "smollm2",
        "gemma3_270m",
        "tiny",
    }
    assert in_hub_cache("mistralai/Mistral-7B-Instruct-v0.3")
    assert not in_hub_cache("internlm/internlm2-chat-7b")
    assert not models["internlm2_7b"][0]
    assert checks(result, "tasks")[MADE] == (
        True,
        "made from wikipedia",
    )
    assert any("ybisk/piqa" in note for _, note in checks(result, "tasks").values())


def test_a_shard_that_is_missing_is_not_ready(consult, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").touch()
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    assert not in_hub_cache("a/b")
    (snapshot / "model-2.safetensors").touch()
    assert in_hub_cache("a/b")


@pytest.mark.slow
def test_a_hub_that_answers_says_what_is_gated(hub: str, tmp_path: Path) -> None:
    """In a process of its own, where it also counts what was imported."""
    code = (
        "import sys; from kvsharer_exp.cli.main import main; "
        f"code = main(['doctor', 'hydra.run.dir={tmp_path}/run']); "
        "print(sorted({'transformers', 'mlflow', 'lm_eval', 'optuna'} & set(sys.modules))); "
        "sys.exit(code)"
    )
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert checks(result, "hub") == {hub: (True, "answers")}
    models = checks(result, "models")
    room = doctor._free_memory()
    for name, source, reason in (
        ("llama2_7b", "Llama-2-7b", "gated: accept its licence on the hub"),
        ("qwen3_8b", "Qwen3-8B", "not on this hub"),
    ):
        works, note = models[name]
        assert not works
        assert note.startswith(reason) or (weight_bytes(source, "bfloat16") or 0) > 0.9 * room
    assert all(works for works, _ in checks(result, "tasks").values())


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:////proc/nope/x.db", "set tracking.uri"),
        ("http://127.0.0.1:9", "set tracking.uri"),
        ("sqlite:///text.db", "file is not a database"),
    ],
)
def test_a_store_that_cannot_be_used(consult, tmp_path: Path, uri: str, reason: str) -> None:
    (tmp_path / "text.db").write_text("no database" * 100)
    works, note = checks(consult(f"tracking.uri={uri}"), "machine")["results"]
    if os.geteuid() or "proc" not in uri:  # to the superuser every folder looks writable
        assert not works and reason in note


def test_a_locked_store(consult, tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as database:
        database.execute("create table t (x)")
        database.execute("begin exclusive")
        works, note = checks(consult("tracking.uri=sqlite:///mlflow.db"), "machine")["results"]
    assert not works and "locked" in note


def test_the_model_of_the_command_line_is_looked_at_first(consult) -> None:
    result = consult("model=mistral", "model.source=/no/such/folder")
    assert result["models"][0]["what"] == "mistral"
    assert checks(result, "models")["mistral"] == (
        False,
        "/no/such/folder is not there: check model.source",
    )
    assert len(result["models"]) == len(MODELS)


def test_who_does_not_answer_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    forever = threading.Event()
    answers = doctor._in_time({"slow": lambda: str(forever.wait()), "fast": lambda: "here"})
    forever.set()
    assert answers == {"slow": "no answer within 0.2 s", "fast": "here"}


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 14),
        ("meta-llama/Llama-3.1-8B-Instruct", 16),
        ("Qwen/Qwen2.5-0.5B", 1),
        ("internlm/internlm2-chat-20b", 40),
        ("mistralai/Mistral-Nemo", None),
        ("org/model-4bit", None),
    ],
)
def test_size_by_name(name: str, gigabytes: float | None) -> None:
    found = weight_bytes(name, "bfloat16")
    assert found == (None if gigabytes is None else gigabytes * 10**9)
