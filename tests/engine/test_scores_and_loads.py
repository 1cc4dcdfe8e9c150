"""``evaluate`` and ``bench`` with ``engine=vllm``: the scores of both runtimes, and what fits.

Run by ``make engine``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsharer_exp import KVPlan
from kvsharer_exp.cli.main import main
from tests.tiny import SMALL

pytestmark = pytest.mark.engine

MAP, PLAN = "0_1_0_1_4_4", "0_a_0_x_4_c"
QUICK = (
    *("model.dtype=float32", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("scoring.num_windows=3", "scoring.window_tokens=32", "scoring.search.tasks=[]"),
    *("heldout.num_windows=2", "heldout.window_tokens=24", "scoring.report.limit=8"),
    *("fit.num_windows=6", "fit.window_tokens=40", "engine=vllm", "engine.eager=true"),
    *("bench.batch_sizes=[1,6]", "bench.contexts=[40]", "bench.new_tokens=8", "bench.repeats=2"),
)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with heads wide enough for vLLM on a CPU, long enough for the tasks."""
    wide = {"vocab_size": 512, "hidden_size": 128, "head_dim": 64, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **wide}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # make layers matter
                parameter.mul_(2)
    place = tmp_path_factory.mktemp("wide") / "wide"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def run(folder: Path, tmp_path: Path, store: list[str]) -> Callable[..., dict[str, Any]]:
    def call(*words: str) -> dict[str, Any]:
        run_dir = f"hydra.run.dir={tmp_path}/run"
        assert main([*QUICK, *store, f"model.source={folder}", run_dir, *words]) == 0
        assert not list((tmp_path / "run").glob("served-*"))
        return json.loads((tmp_path / "run" / "result.json").read_text())

    return call


@pytest.mark.parametrize("plan", [MAP, PLAN])
def test_both_runtimes_score_alike(run, plan: str) -> None:
    tasks = "scoring.report.tasks=[wiki_cloze,wiki_next,wiki_ppl]"
    result = run("evaluate", f"plan={plan}", tasks)
    engine = result["engine"]
    for name, value in engine["scores"].items():
        assert value == pytest.approx(result["scores"][name], rel=1e-4), name
    assert len(engine["agreement"]) == 3
    for task, found in engine["agreement"].items():
        assert found["items"] == 8
        assert found["largest_difference"] < 1e-3, task
        if task != "wiki_ppl":
            assert found["same_choice"] == found["same_score"] == 8
    differs = max(abs(result["scores"]["kl"]), result["scores"]["perplexity/report"])
    assert differs > 1e-3  # the plan matters to this model


def test_blocks_are_in_the_ratio_of_owners(run) -> None:
    result = run("bench", f"map={MAP}", f"compare={PLAN}", "serve.kv_gib=0.03125")
    sides = result["plans"]
    assert [side["owners"] for side in sides.values()] == [6, 3, 2]
    memory, page = 2**25, sides["full"]["bytes_per_block"] // 6
    for side in sides.values():
        owners = len(KVPlan.parse(side["plan"]).owners)
        assert side["num_blocks"] == side["predicted_blocks"] == memory // (owners * page)
    (alone, loaded) = result["cells"]
    for name in sides:
        assert alone[name]["tokens_per_second"]["median"] > 0
        assert alone[name]["token_seconds"]["median"] > 0
        assert loaded[name]["requests_that_fit"] == sides[name]["num_blocks"] - 1
        assert loaded[name]["preemptions"] == 0
