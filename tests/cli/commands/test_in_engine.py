"""``engine=vllm`` with a fake engine: what ``evaluate`` and ``bench`` refuse, compare and leave."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from kvsharer_exp import load_model
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import plans
from kvsharer_exp.cli.steps.engine_bench import cell_side, turns_of
from kvsharer_exp.shipping.vllm import server
from kvsharer_exp.shipping.vllm.load import Burst
from tests.cli.commands.test_serve import use
from tests.engines import left
from tests.refusals import check_refusal
from tests.tiny import tiny_model

MAP, PLAN = "map=0_0_2_3_4_4", "plan=0_1_0_x_c_a"
QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("scoring.num_windows=3", "scoring.window_tokens=32", "scoring.search.tasks=[]"),
    *("heldout.num_windows=2", "heldout.window_tokens=24", "scoring.report.limit=3"),
    *("fit.num_windows=6", "fit.window_tokens=40", "engine=vllm", "serve.kv_gib=0.01"),
    *("bench.batch_sizes=[1,3]", "bench.contexts=[20]", "bench.new_tokens=4", "bench.repeats=2"),
)
TASKS = "scoring.report.tasks=[wiki_cloze,wiki_next,wiki_ppl]"


@pytest.fixture
def run(tmp_path: Path, monkeypatch, store: list[str]) -> Callable[..., int]:
    """Run a command in an empty folder; the running Python is no engine before ``use``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVSHARER_ENGINE_PYTHON", raising=False)
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")
    return lambda *words: main([*QUICK, *store, f"hydra.run.dir={tmp_path}/run", *words])


@pytest.fixture
def refused(run, capfd, monkeypatch) -> Callable[..., None]:
    """The line is right, and nothing was started."""
    monkeypatch.setattr(server.Server, "__enter__", lambda self: pytest.fail("a server started"))

    def call(names: str, *words: str) -> None:
        capfd.readouterr()
        assert run(*words, "--quiet") == 2
        check_refusal(capfd.readouterr().err, names)

    return call


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "result.json").read_text())


@pytest.mark.parametrize("plan", [pytest.param(MAP, marks=pytest.mark.slow), PLAN])
def test_an_honest_engine_agrees_on_every_item(
    run, plan: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    pids = use(monkeypatch, tmp_path, "honest")
    assert run("evaluate", plan, TASKS) == 0
    assert left(pids) == []
    result = result_of(tmp_path)
    engine, scores = result["engine"], result["scores"]
    assert (engine["name"], engine["dtype"], engine["max_len"]) == ("vllm", "float32", 2048)
    assert engine["versions"]["vllm"] == "0.32.0"
    assert {name.split("/")[1] for name in engine["scores"]} == set(engine["agreement"])
    assert engine["scores"] == pytest.approx({k: scores[k] for k in engine["scores"]}, rel=1e-5)
    assert engine["intervals"].keys() == engine["scores"].keys()
    texts = {"wiki_cloze": 3, "wiki_next": 12, "wiki_ppl": 3}
    for task, found in engine["agreement"].items():
        whole = None if task == "wiki_ppl" else 3
        assert (found["items"], found["texts"]) == (3, texts[task])
        assert (found["same_choice"], found["same_score"]) == (whole, whole)
        assert 0 <= found["largest_difference"] < 1e-2
    said = capfd.readouterr().out
    assert "vLLM 0.32.0" in said and "3 of 3" in said
    said = " ".join(said.split())
    name = "lm_eval/wiki_next/acc"
    ends = "({:.3g}–{:.3g})".format(*engine["intervals"][name])
    assert f"{engine['scores'][name]:.6g} {ends}" in said
    assert "+0 (0–0)" in said and "that of a difference is paired" in said
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"plan.log", "result.json"}
    assert not list((tmp_path / "run").glob("served-*"))


@pytest.mark.slow
def test_another_answer_is_seen(run, tmp_path: Path, monkeypatch) -> None:
    """The comparison is of what the engine says: weights of another seed are told apart."""
    use(monkeypatch, tmp_path, "honest")
    asked = server.Server.__enter__

    def with_other_weights(self: server.Server) -> server.Server:
        load_model("tiny", device="cpu", seed=1)[0].save_pretrained(tmp_path / "other")
        weights = self.serving.folder / "model.safetensors"
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
        return asked(self)

    monkeypatch.setattr(server.Server, "__enter__", with_other_weights)
    assert run("evaluate", "map=0_1_2_3_4_5", TASKS) == 0
    found = result_of(tmp_path)["engine"]["agreement"]
    assert min(one["largest_difference"] for one in found.values()) > 1


@pytest.mark.slow  # as long as a sweep
def test_both_runtimes_cut_long_texts_alike(run, tmp_path: Path, monkeypatch) -> None:
    use(monkeypatch, tmp_path, "honest")
    assert run("evaluate", MAP, "serve.max_len=500", TASKS) == 0
    engine = result_of(tmp_path)["engine"]
    assert engine["max_len"] == 500
    assert max(one["largest_difference"] for one in engine["agreement"].values()) < 1e-2


@pytest.mark.slow
def test_an_engine_that_fails_leaves_nothing(run, tmp_path: Path, monkeypatch, capfd) -> None:
    for behaviour, says in (("constant", "gives no log-likelihoods"), ("fails", "did not start")):
        pids = use(monkeypatch, tmp_path, behaviour)
        assert run("evaluate", MAP, TASKS, "--quiet") == 1
        assert says in capfd.readouterr().err
        assert left(pids) == []
        assert not list((tmp_path / "run").glob("served-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(
    run, tmp_path: Path, monkeypatch, number: signal.Signals, code: int
) -> None:
    pids = use(monkeypatch, tmp_path, "hangs")

    def send() -> None:
        while not pids.is_file() or len(pids.read_text().split()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert run("bench", MAP, "--quiet") == code
    thread.join()
    assert left(pids) == []
    assert not list((tmp_path / "run").glob("served-*"))


@pytest.fixture
def generates(tmp_path: Path) -> Path:
    file = tmp_path / "odd.yaml"
    file.write_text(
        "task: odd\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/odd.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "odd.jsonl").write_text('{"q": "x", "a": "y"}\n')
    return file


@pytest.mark.slow
def test_what_evaluate_cannot_do(refused, generates: Path, tmp_path: Path, monkeypatch) -> None:
    refused("no vLLM here: run make engine", "evaluate", MAP, TASKS)
    use(monkeypatch, tmp_path, "honest")
    refused("layer 1 cannot keep 4 bits in vLLM", "evaluate", "plan=0_1q4_2_3_4_5", TASKS)
    refused("engine=vllm scores tasks", "evaluate", MAP, "scoring.report.tasks=[]")
    refused("task odd generates answers", "evaluate", MAP, f"scoring.report.tasks=[{generates}]")
    refused("serve.max_len=9: give at least 32", "evaluate", MAP, TASKS, "serve.max_len=9")
    refused("serve.max_len is 3000 tokens", "evaluate", MAP, TASKS, "serve.max_len=3000")
    refused("serve.kv_gib=0.0001 holds no", "evaluate", MAP, TASKS, "serve.kv_gib=0.0001")
    for name, dtype, names in (
        ("olmo", "float32", "OlmoForCausalLM runs under no plan in vLLM"),
        ("llama", "auto", "float64 is no dtype of vLLM"),
    ):
        other = tmp_path / name
        tiny_model(name, vocab_size=259).save_pretrained(other)
        load_model("tiny", device="cpu")[1].save_pretrained(other)
        model = (f"model.source={other}", f"model.dtype={dtype}")
        refused(names, "evaluate", MAP, TASKS, *model)
    refused("sweep knows no engine=vllm", "sweep")
    refused("engine 'vlm' is unknown: did you mean vllm?", "evaluate", "engine=vlm")


@pytest.mark.slow
def test_what_bench_cannot_do(refused, tmp_path: Path, monkeypatch) -> None:
    refused("no vLLM here: run make engine", "bench", MAP)
    use(monkeypatch, tmp_path, "constant")
    refused("no map given", "bench")
    refused("layer 1 cannot keep 4 bits in vLLM", "bench", MAP, "compare=0_1q4_2_3_4_5")
    refused("bench.new_tokens=1: give at least 2", "bench", MAP, "bench.new_tokens=1")
    refused("bench.repeats=1: give at least 2", "bench", MAP, "bench.repeats=1")
    refused("is 3004 tokens, but the model has", "bench", MAP, "bench.contexts=[3000]")


def test_bench_lays_plans_beside_the_full_cache(
    run, store: list[str], tmp_path: Path, monkeypatch, capfd
) -> None:
    pids = use(monkeypatch, tmp_path, "constant", 13)
    assert run("bench", MAP, "compare=0_1_0_x_c_a") == 0
    assert left(pids) == []
    result = result_of(tmp_path)
    sides = result["plans"]
    assert list(sides) == ["full", "map", "compare"]
    assert [side["owners"] for side in sides.values()] == [6, 4, 2]
    assert [side["plan"] for side in sides.values()][1:] == ["0_0_2_3_4_4", "0_1_0_x_c_a"]
    # 24 tokens are two blocks of 16, and one of the 13 blocks is vLLM's own.
    assert all(side["requests_that_fit"] == {"20": 6} for side in sides.values())
    page = 2 * 16 * 2 * 16 * 4
    assert [side["bytes_per_block"] for side in sides.values()] == [6 * page, 4 * page, 2 * page]
    memory = int(0.01 * 2**30)
    assert [side["predicted_blocks"] for side in sides.values()] == [
        memory // side["bytes_per_block"] for side in sides.values()
    ]
    assert [(cell["load"], cell["context"]) for cell in result["cells"]] == [(1, 20), (3, 20)]
    for cell in result["cells"]:
        for name in sides:
            side = cell[name]
            assert side["token_seconds"]["rounds"] == [0.5, 0.5]
            assert side["ratios"]["token_seconds"] == {"mean": 1, "low": 1, "high": 1}
            assert side["preemptions"] == 2 * 3 * cell["load"]
            rates = side["tokens_per_second"]
            assert rates["median"] == median(rates["rounds"]) > 0
            assert side["ratios"]["tokens_per_second"]["mean"] == pytest.approx(
                math.prod(
                    a / b
                    for a, b in zip(
                        rates["rounds"], cell["full"]["tokens_per_second"]["rounds"], strict=True
                    )
                )
                ** 0.5
            )
    said = capfd.readouterr().out
    starts = [line.split()[-6] for line in said.splitlines() if "starting vLLM for" in line]
    assert starts == ["full", "map", "compare", "map", "full"]
    assert "4/6 shared" not in said and "2/6 shared" in said
    assert "| 3×20 | full | 13 | 6 |" in (tmp_path / "run" / "bench.md").read_text()
    assert not list((tmp_path / "run").glob("served-*"))


def test_a_report_passes_over_loads(run, store: list[str], tmp_path: Path, monkeypatch) -> None:
    use(monkeypatch, tmp_path, "constant", 13)
    assert run("bench", MAP) == 0
    run_id = result_of(tmp_path)["mlflow_run_id"]
    words = ["report", f"run={run_id}", f"hydra.run.dir={tmp_path}/report", *store]
    assert main(words) == 0


def test_turns_go_forward_and_back() -> None:
    turns = list(turns_of(["A", "B", "C"], 3))
    assert "".join(name for _, name in turns) == "ABCCBAABC"
    assert [number for number, _ in turns] == [0] * 3 + [1] * 3 + [2] * 3


def test_ratios_are_round_by_round() -> None:
    """The machine is half as fast in the second round, which no ratio sees."""
    full = [Burst(100.0, 0.02, 0), Burst(50.0, 0.04, 1)]
    found = cell_side([Burst(120.0, 0.01, 2), Burst(60.0, 0.02, 3)], full)
    assert found["tokens_per_second"]["median"] == 90
    assert found["preemptions"] == 5
    assert found["ratios"]["tokens_per_second"]["low"] == pytest.approx(1.2)
    assert found["ratios"]["token_seconds"]["high"] == pytest.approx(0.5)
