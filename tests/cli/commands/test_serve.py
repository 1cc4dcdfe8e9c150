"""``serve`` with a fake engine: what it refuses and compares, and that it leaves no process."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvsharer_exp import load_model
from kvsharer_exp.cli.commands import serve as command
from kvsharer_exp.cli.main import main
from kvsharer_exp.shipping.vllm.check import TokenCheck
from kvsharer_exp.values.ports import free_port
from tests.engines import fake_settings, left
from tests.refusals import check_refusal
from tests.shipping.exports import export, export_plan

QUICK = ("serve.dtype=float32", "serve.prompts=3", "serve.prompt_tokens=6", "serve.new_tokens=4")
TEXT = "Thequickbrownfoxjumpsoverthelazydog."  # the tiny models do not know the id of a space


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("llama", tokenizer(), tmp_path_factory.mktemp("exports") / "export")


def tokenizer() -> Any:
    return load_model("tiny", device="cpu")[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; the running Python is no engine unless ``use`` makes it one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVSHARER_ENGINE_PYTHON", raising=False)
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, behaviour: str, blocks: int = 1) -> Path:
    for name, value in fake_settings(behaviour, folder / "pids", blocks).items():
        monkeypatch.setenv(name, value)
    return folder / "pids"


def serve(*words: object) -> int:
    port = f"serve.port={free_port()}"
    return main(["serve", port, f"hydra.run.dir={Path.cwd()}/run", *map(str, words)])


def refused(capfd, names: str, *words: object, code: int = 2) -> None:
    assert serve(*words) == code
    check_refusal(capfd.readouterr().err, names)


def changed(exported: Path, folder: Path, **keys: object) -> Path:
    """A folder like ``exported``, with other keys in its config.json."""
    copy = folder / "changed"
    copy.mkdir()
    for file in exported.iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((exported / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({**config, **keys}))
    return copy


def test_what_it_cannot_serve(capfd, folder: Path, exported: Path) -> None:
    refused(capfd, "no export given: give serve.folder=FOLDER")
    refused(capfd, "there is no config.json", "serve.folder=/no/such/folder")
    earlier = changed(exported, folder, architectures=["LlamaForCausalLM"])
    refused(capfd, "an export by an earlier version", f"serve.folder={earlier}")
    plan = export_plan("llama", "quantised", tokenizer(), folder / "plan")
    refused(capfd, "layer 0 cannot keep 4 bits in vLLM", f"serve.folder={plan}")
    assert not (folder / "run" / "server.log").exists()


def test_a_wrong_source_in_the_export(capfd, folder: Path, exported: Path) -> None:
    sources = json.loads((exported / "config.json").read_text())["kv_source_layers"]
    target = next(layer for layer, source in enumerate(sources) if source not in (layer, 1))
    other = changed(
        exported, folder, kv_source_layers=[*sources[:target], 1, *sources[target + 1 :]]
    )
    refused(capfd, f"layer {target} is 1 in config.json", "--check", f"serve.folder={other}")


def test_without_an_engine(capfd, folder: Path, exported: Path) -> None:
    asked = f"serve.folder={exported}"
    refused(capfd, "no vLLM here: run make engine", asked)
    refused(capfd, "engine.python=/no/python is no program", asked, "engine.python=/no/python")
    refused(capfd, "does not answer", asked, "engine.python=false")


@pytest.mark.slow
def test_values_out_of_range(capfd, folder: Path, exported: Path, monkeypatch) -> None:
    use(monkeypatch, folder, "constant")
    for names, *words in CASES:
        refused(capfd, names, f"serve.folder={exported}", *words)


CASES = [
    ("serve.port=0: give a port", "serve.port=0"),
    ("serve.kv_gib=0: give GiB above 0", "serve.kv_gib=0"),
    ("serve.dtype=int8 is unknown", "serve.dtype=int8"),
    ("serve.prompts=0: give at least 1", "serve.prompts=0"),
    ("engine.start_minutes=0: give minutes", "engine.start_minutes=0"),
    ("serve.max_len=90 is below the 96 tokens of a check", "serve.max_len=90", "--check"),
    ("holds at most 256 tokens: lower", "serve.max_len=257", "serve.dtype=float32"),
    ("holds at most 256 tokens", "serve.new_tokens=240", "serve.dtype=float32", "--check"),
    ("serve.kv_gib=0.0001 holds no request of 256", "serve.kv_gib=1e-4", "serve.dtype=float32"),
    ("holds float64, which no engine serves: give serve.dtype=",),
]


def test_check_is_for_serve_only(capfd, folder: Path) -> None:
    assert main(["doctor", "--check"]) == 2
    check_refusal(capfd.readouterr().err, "--check is for serve")


def test_a_port_in_use(capfd, folder: Path, exported: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        names = f"port {port} is in use: give another with serve.port="
        refused(capfd, names, f"serve.folder={exported}", f"serve.port={port}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_serves_until_it_is_stopped(
    capfd, folder: Path, exported: Path, monkeypatch, number: signal.Signals, code: int
) -> None:
    pids = use(monkeypatch, folder, "constant")
    said = ""

    def stop() -> None:
        nonlocal said
        while "Ctrl-C stops it" not in said:
            time.sleep(0.05)
            said += capfd.readouterr().out
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert serve(f"serve.folder={exported}", "serve.name=mine", *QUICK) == code
    thread.join()
    assert left(pids) == []
    assert "VLLM_PLUGINS=kvsharer_exp" in said
    assert f"--model {exported} --served-model-name mine --host 127.0.0.1" in said
    assert "--kv-cache-memory-bytes 1073741824" in said
    assert "serving  mine at http://127.0.0.1:" in said
    assert "\n" not in capfd.readouterr().err.strip()


def test_a_start_that_fails(capfd, folder: Path, exported: Path, monkeypatch) -> None:
    pids = use(monkeypatch, folder, "fails")
    assert serve(f"serve.folder={exported}", *QUICK) == 1
    error = capfd.readouterr().err
    assert "(ValueError: no such thing as this model): see " in error and "server.log" in error
    assert error.count("\n") == 1
    assert (folder / "run" / "server.log").is_file()
    assert left(pids) == []
    pids = use(monkeypatch, folder, "no_room")
    refused(capfd, "serve.kv_gib=1.0 holds no request", f"serve.folder={exported}", *QUICK)


def check(folder: Path, exported: Path, *words: str) -> tuple[int, dict]:
    (folder / "text.txt").write_text("\n".join(f"{index}{TEXT}" for index in range(9)))
    text = f"heldout.path={folder}/text.txt"
    code = serve("--check", f"serve.folder={exported}", text, "serve.kv_gib=0.001", *QUICK, *words)
    return code, json.loads((folder / "run" / "result.json").read_text())


BLOCKS = int(0.001 * 2**30) // (4 * 2 * 16 * 2 * 16 * 4)  # four owners of six layers


def test_a_check_that_passes(capfd, folder: Path, exported: Path, monkeypatch) -> None:
    pids = use(monkeypatch, folder, "honest", BLOCKS)
    code, result = check(folder, exported)
    printed = capfd.readouterr()
    assert (code, printed.err) == (0, "")
    assert left(pids) == []
    assert "12 of 12 equal in float32" in printed.out
    assert f"{BLOCKS} reported, {BLOCKS} predicted" in printed.out
    assert (result["command"], result["schema"], result["passes"]) == ("serve", 1, True)
    assert result["tokens"]["equal"] == result["tokens"]["positions"] == 12
    assert result["blocks"]["predicted"]["num_blocks"] == result["blocks"]["reported"] == BLOCKS
    assert result["engine"]["vllm"] == "0.32.0"
    assert result["model"]["num_layers"] == 6


def test_a_check_of_other_tokens_fails(capfd, folder: Path, exported: Path, monkeypatch) -> None:
    pids = use(monkeypatch, folder, "constant", BLOCKS)
    code, result = check(folder, exported)
    error = capfd.readouterr().err
    assert code == 1 and error.count("\n") == 1
    assert error.startswith("kvsharer: the check failed: ") and "tokens differ, prompt 0" in error
    assert not result["passes"] and result["tokens"]["wrong"]
    assert left(pids) == []


def test_a_check_of_other_blocks_fails(capfd, folder: Path, exported: Path, monkeypatch) -> None:
    use(monkeypatch, folder, "constant", BLOCKS - 1)
    equal = TokenCheck("float32", 12, 12, (), ())
    monkeypatch.setattr(command, "check_answers", lambda *_: equal)
    code, result = check(folder, exported)
    error = capfd.readouterr().err
    assert code == 1
    assert f"the check failed: {BLOCKS - 1} KV blocks reported, {BLOCKS} predicted" in error
    assert not result["passes"]


def test_memory_left_to_the_engine_predicts_nothing(
    capfd, folder: Path, exported: Path, monkeypatch
) -> None:
    use(monkeypatch, folder, "constant", 3)
    _, result = check(folder, exported, "serve.kv_gib=null")
    assert result["blocks"] is None and result["cache"]["num_blocks"] == 3
    assert "3 reported; serve.kv_gib= lets them be predicted" in capfd.readouterr().out
