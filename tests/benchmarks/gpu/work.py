"""What the parts of ``make gpu`` do; `worker` calls these functions.

Models have random weights of the shape that a pretrained model has, made on the device: what is
timed and counted does not depend on the weights.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from io import StringIO
from statistics import median
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvsharer_exp.measure.benchmark import measure
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.fits import fit_plan
from kvsharer_exp.measure.prediction import predict
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.values.plan import KVPlan
from tests.benchmarks.gpu.parts import ROOT
from tests.benchmarks.trial_cost import KINDS, STEP, plan_of, trial
from tests.gpu.models import REHEARSAL

# layers, hidden size, heads, KV heads, intermediate size, vocabulary
SHAPES = {
    "smollm2": (30, 576, 9, 3, 1536, 49152),
    "7b": (32, 4096, 32, 32, 11008, 32000),  # Llama-2-7B
    "tiny": (12, 32, 2, 1, 48, 96),
}
FIRST_STAGE = 2  # windows of the first stage of a search, where several maps go in one forward
TOGETHER = (1, 4, 8)


@lru_cache(maxsize=1)
def random_llama(shape: str, dtype: str, device: str) -> Any:
    """A llama of ``shape`` with random weights; the last one is kept, for the next part."""
    layers, hidden, heads, kv_heads, intermediate, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,  # the paper's longest cell is longer than Llama 2 allows
        tie_word_embeddings=shape == "smollm2",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def run_tests(file: str, device: str) -> dict[str, Any]:
    """Run the GPU-marked tests of ``file`` in this process; failures are counted, not raised.

    Raises:
        RuntimeError: pytest could not run, or found no test.
    """
    seen, output = Recorder(), StringIO()
    options = ["-m", "gpu", "-q", "--timeout=0", f"--rootdir={ROOT}", str(ROOT / file)]
    needless = ("cacheprovider", "faulthandler", "xdist", "hydra_pytest", "hypothesispytest")
    off = [f"-pno:{name}" for name in needless]
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        patch.setenv(REHEARSAL, "1" if device == "cpu" else "0")
        code = pytest.main([*options, *off], plugins=[seen])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}: {output.getvalue()[-500:]}")
    return {"file": file, **seen.counts}


class Recorder:
    """A pytest plugin that keeps how many tests passed, and which did not and why."""

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.failed:  # also in the setup or the teardown
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(report.longrepr) if crash is None else crash.message
            self.counts["failed"][name] = said[:2000]
        elif report.skipped:
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.counts["skipped"][name] = said.removeprefix("Skipped: ")
        elif report.when == "call":
            self.counts["passed"] += 1


def time_evaluator(
    shape: str, dtype: str, device: str, windows: int, tokens: int, repeats: int
) -> dict[str, Any]:
    """Seconds a trial by kind of plan, and seconds a map when several go in one forward."""
    model = random_llama(shape, dtype, device)
    layers, first = model.config.num_hidden_layers, model.config.num_hidden_layers // 3
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (windows + 2, tokens), generator=generator)
    evaluator = Evaluator(model, ids[:windows], cuts=(FIRST_STAGE,))
    began = time.perf_counter()
    _ = evaluator.full_scores
    full_seconds = time.perf_counter() - began
    plans = {"share": FittedPlan(plan_of(layers, first, ("{source}",)))}
    for name, texts in KINDS.items():
        plans[name] = fit_plan(model, plan_of(layers, first, texts), ids)
    rows = []
    for name, plan in plans.items():
        trial(evaluator, plan)  # warms up
        runs = [trial(evaluator, plan) for _ in range(repeats)]
        rows.append({"plan": name, "blocks": runs[0][1], **_spread([run[0] for run in runs])})
    maps = [
        plan_of(layers, first, ("{source}",), step=step) for step in range(1, max(TOGETHER) + 1)
    ]
    return {
        **{"shape": shape, "dtype": dtype, "windows": windows, "window_tokens": tokens},
        **{"first_changed_layer": first, "every": STEP, "first_stage_windows": FIRST_STAGE},
        "full_seconds": full_seconds,
        "trials": rows,
        "maps_per_forward": {
            str(number): _seconds_per_map(evaluator, maps, number, repeats) for number in TOGETHER
        },
    }


def _seconds_per_map(
    evaluator: Evaluator, maps: list[KVPlan], together: int, repeats: int
) -> dict[str, float]:
    """Each forward starts where the maps leave the full cache, whatever was scored before."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for start in range(0, len(maps), together):
            evaluator.reset()
            group = maps[start : start + together]
            evaluator.score_together(group, windows=slice(0, FIRST_STAGE))
        seconds.append((time.perf_counter() - began) / len(maps))
    return _spread(seconds[1:])  # the first warms up


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"seconds": median(seconds), "min": min(seconds), "max": max(seconds)}


def time_cell(
    shape: str,
    dtype: str,
    device: str,
    plan: str,
    batch: int,
    context: int,
    new_tokens: int,
    decoded: str,
    repeats: int,
) -> dict[str, Any]:
    """A cell of ``bench``: the full cache and a plan, measured and predicted."""
    model = random_llama(shape, dtype, device)
    texts = {"shared": (STEP - 1, "{source}", STEP), "q4": (0, "{layer}q4s4", 1)}
    first, text, step = texts[plan]
    what = plan_of(model.config.num_hidden_layers, first, (text,), step=step)
    size = {"batch": batch, "context": context, "new_tokens": new_tokens}
    predicted = predict(model, what, **size)
    return {
        **{"shape": shape, "dtype": dtype, "plan": plan, "actions": str(what)},
        **{"batch": batch, "context": context, "decoded": decoded},
        "predicted": predicted,
        **measure(model, what, **size, repeats=repeats),
    }


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "tests": run_tests,
    "evaluator": time_evaluator,
    "bench": time_cell,
}


def clear(device: str) -> None:
    """Give back what the part before left on the device, but for the model that is kept."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
