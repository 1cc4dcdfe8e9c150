"""A model whose weights wait elsewhere measures as one with its weights in place.

accelerate keeps all weights aside, on the CPU here, and brings those of a layer when it runs.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from kvsharer_exp import FittedPlan, KVPlan, apply_plan, fit_plan
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.tasks import load_tasks
from kvsharer_exp.measure.action_errors import action_errors
from kvsharer_exp.measure.calibration import block_errors, layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.perplexity import perplexity
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.footprint import measured_footprint
from kvsharer_exp.model.load import load_model
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.errors import InputError
from tests.tiny import tiny_model, tokens

PLAN = KVPlan.parse("0_a_2q4g8s2_2_c_x")
WITHOUT_FITS = KVPlan.parse("0_x_2q4g8s2_2_0_x")
WINDOWS = tokens(4, 16)


def aside(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` whose weights are all offloaded."""
    copied = copy.deepcopy(model)
    cpu_offload(copied, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in copied.parameters()} == {"meta"}
    return copied


@pytest.fixture(scope="module")
def offloaded() -> PreTrainedModel:
    return aside(tiny_model("llama"))


def logits_of(model: PreTrainedModel, fitted: FittedPlan) -> torch.Tensor:
    with torch.inference_mode(), apply_plan(model, fitted):
        return model(WINDOWS).logits


MEASURES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "logits": lambda model: logits_of(model, fit_plan(model, PLAN, WINDOWS)),
    "scores": lambda model: Evaluator(model, WINDOWS).score(WITHOUT_FITS),
    "means": lambda model: list(layer_means(model, WINDOWS).keys),
    "block errors": lambda model: [
        *(error for row in block_errors(model, WINDOWS) for error in row if not math.isnan(error)),
        *action_errors(model, WINDOWS, {1: [(Drop(), None)]})[1],
    ],
    "perplexity": lambda model: perplexity(model, WINDOWS),
    "bytes": lambda model: measured_footprint(model, WITHOUT_FITS, WINDOWS),
}


@pytest.mark.parametrize("name", MEASURES)
def test_it_is_measured_the_same(name: str, offloaded: PreTrainedModel) -> None:
    found, expected = MEASURES[name](offloaded), MEASURES[name](tiny_model("llama"))
    if name in ("logits", "means"):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


def test_so_are_tasks() -> None:
    model, tokenizer = load_model("tiny")
    tasks = load_tasks(["wiki_next", "copying"], split_texts())
    first, second = (
        TaskScorer(each, tokenizer, tasks, limit=2, batch_size=2, add_bos_token=False)
        for each in (model, aside(model))
    )
    assert first.score() == second.score()


def test_an_overflow_is_found_and_named() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(torch.inf)
    with pytest.raises(InputError, match="at layer 2"):
        Evaluator(aside(model), WINDOWS).score(KVPlan.full(6))
