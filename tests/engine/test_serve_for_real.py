"""``kvsharer serve`` with vLLM itself; ``tests/cli/commands/test_serve.py`` has a fake one."""

import copy
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvsharer_exp import load_model
from kvsharer_exp.cli.main import main
from kvsharer_exp.shipping.vllm.check import check_answers
from kvsharer_exp.shipping.vllm.environment import find_engine
from kvsharer_exp.shipping.vllm.folder import ExportFolder
from kvsharer_exp.shipping.vllm.server import Server, Serving
from kvsharer_exp.values.ports import free_port
from tests.engine.exports import NEW_TOKENS, PROMPTS, export, wide_model
from tests.refusals import check_refusal

pytestmark = pytest.mark.engine

MAP = "0_0_2_3_2_5"
SMOLLM2 = "_".join({20: "18", 24: "23", 28: "25", 29: "25"}.get(i, str(i)) for i in range(30))


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = copy.deepcopy(wide_model("llama"))
    return export(model, tokenizer, MAP, tmp_path_factory.mktemp("llama") / "export")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def serve(exported: Path, *words: str) -> int:
    common = ["engine.eager=true", f"serve.port={free_port()}", f"hydra.run.dir={Path.cwd()}/run"]
    return main(["serve", f"serve.folder={exported}", *common, *words])


def result() -> dict[str, Any]:
    return json.loads(Path("run/result.json").read_text())


def check_passes(found: dict[str, Any], owners: int) -> None:
    assert found["passes"]
    assert found["tokens"]["equal"] == found["tokens"]["positions"] == 512
    assert found["blocks"]["reported"] == found["blocks"]["predicted"]["num_blocks"]
    assert found["blocks"]["predicted"]["group_layers"] == owners


def test_a_tiny_llama_under_a_map(llama: Path) -> None:
    assert serve(llama, "--check", "serve.kv_gib=0.1") == 0
    found = result()
    check_passes(found, owners=4)
    assert found["blocks"]["reported"] == int(0.1 * 2**30) // (4 * 2 * 128 * 2 * 64 * 4)


def test_a_compiled_model_answers_the_same(llama: Path) -> None:
    assert serve(llama, "--check", "serve.kv_gib=0.1", "engine.eager=false") == 0
    check_passes(result(), owners=4)


def test_smollm2_under_a_map(folder: Path) -> None:
    model, tokenizer = load_model("smollm2", device="cpu")
    exported = export(model, tokenizer, SMOLLM2, folder / "export")
    assert serve(exported, "--check", "serve.kv_gib=0.5", "serve.max_len=2048") == 0
    check_passes(result(), owners=26)


@pytest.mark.parametrize(
    ("plan", "group_layers", "saves"), [("0_1_2_1_4_5", 2, False), ("0_1_2_1_4_1", 1, True)]
)
def test_two_kinds_of_attention_are_grouped_as_predicted(
    tokenizer: Any, folder: Path, capfd, plan: str, group_layers: int, saves: bool
) -> None:
    """A tiny Gemma 3 has three sliding and three full layers, in turn."""
    model = copy.deepcopy(wide_model("gemma3_text"))
    exported = export(model, tokenizer, plan, folder / "export")
    assert serve(exported, "--check", "serve.kv_gib=0.1") == 0
    check_passes(result(), owners=group_layers)
    assert ("this plan saves nothing in vLLM" in capfd.readouterr().out) is not saves


def wrong_source(exported: Path, folder: Path, *files: str) -> Path:
    """A copy in whose ``files`` layer 4 reads layer 3, not 2."""
    copied = shutil.copytree(exported, folder / "wrong")
    for name in files:
        held = json.loads((copied / name).read_text())
        assert held["kv_source_layers"][4] == 2
        held["kv_source_layers"][4] = 3
        (copied / name).write_text(json.dumps(held))
    return copied


def test_a_wrong_source_is_refused(llama: Path, folder: Path, capfd) -> None:
    assert serve(wrong_source(llama, folder, "config.json"), "--check") == 2
    check_refusal(capfd.readouterr().err, "layer 4 is 3 in config.json")


def test_a_wrong_source_gives_other_tokens(llama: Path, folder: Path) -> None:
    """What the comparison is worth: the engine runs the wrong map, the reference the right one."""
    wrong = wrong_source(llama, folder, "config.json", "sharing_map.json")
    assert ExportFolder.read(wrong).plan.texts[4] == "3"
    serving = Serving(
        find_engine().python, wrong, free_port(), "m", 0.1, dtype="float32", eager=True
    )
    with Server(serving, folder / "server.log") as server:
        answers = server.client.complete_all(PROMPTS, NEW_TOKENS, at_once=8)
    assert check_answers(wrong, "float32", PROMPTS, answers).passes
    found = check_answers(llama, "float32", PROMPTS, answers)
    assert not found.passes and len(found.wrong) > len(PROMPTS)


def test_too_little_memory_for_one_request(llama: Path, capfd) -> None:
    assert serve(llama, "serve.kv_gib=0.001") == 2
    check_refusal(capfd.readouterr().err, "serve.kv_gib=0.001 holds no request of")
    assert psutil.Process().children(recursive=True) == []


def test_ctrl_c_leaves_no_process(llama: Path, capfd) -> None:
    running: list[psutil.Process] = []

    def stop() -> None:
        while "Ctrl-C stops it" not in capfd.readouterr().out:
            time.sleep(0.1)
        running.extend(psutil.Process().children(recursive=True))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    assert serve(llama, "serve.kv_gib=0.1") == 130
    thread.join()
    assert len(running) >= 3  # the server, the engine and its worker
    _, alive = psutil.wait_procs(running, timeout=2)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
