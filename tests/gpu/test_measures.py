"""Fits, ``bench`` and trained weights on a GPU."""

import pytest
import torch

from kvsharer_exp.measure.benchmark import measure
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.fits import fit_plan
from kvsharer_exp.model.actions.sizes import kv_bytes
from kvsharer_exp.model.load import load_model
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from tests.gpu.models import CLOSE, llama_on
from tests.tiny import some_map, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", CLOSE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_fits_are_made_on_the_device(dtype: torch.dtype, device: torch.device) -> None:
    windows = tokens(24, 24)
    wanted = KVPlan.parse("0_a_2_c_4_a")
    exact = fit_plan(llama_on(torch.device("cpu"), torch.float64), wanted, windows[:20])
    model = llama_on(device, dtype)
    made = fit_plan(model, wanted, windows[:20])
    for layer, fit in made.fits.items():
        assert fit.error == pytest.approx(exact.fits[layer].error, rel=10 * CLOSE[dtype])
        for tensor in fit.tensors.values():
            assert (tensor.dtype, tensor.isfinite().all()) == (dtype, True)
    evaluator = Evaluator(model, windows[20:])
    dropped = evaluator.score(KVPlan.parse("0_x_2_x_4_x"))
    assert evaluator.score(made).kl < dropped.kl


def test_bench_counts_the_bytes_on_the_device(device: torch.device) -> None:
    model = llama_on(device, torch.bfloat16)
    sharing_map = some_map(model, 2)
    cell = measure(model, sharing_map, batch=2, context=6, new_tokens=3, repeats=2)
    layers = attention_layers(model)
    for side, one in (("full", SharingMap.identity(6)), ("shared", sharing_map)):
        held = kv_bytes(KVPlan.of(one), layers, 9, model.dtype.itemsize) * 2
        assert cell[side]["cache_bytes"] == held
        memory = "peak_memory_bytes" if device.type == "cuda" else "resident_bytes"
        assert cell[side][memory]["median"] > held
    assert cell["shared"]["kv_projection_calls"] == 0 < cell["full"]["kv_projection_calls"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smollm2_scores_as_on_the_cpu(dtype: str, cuda: torch.device) -> None:
    """With trained weights: the KL of a map in 16 bits on the GPU and in float32 on the CPU."""
    try:
        exact, tokenizer = load_model("smollm2", device="cpu")
    except InputError as error:
        pytest.skip(f"the weights cannot be had here: {error}")
    model, _ = load_model("smollm2", dtype=dtype, device=str(cuda))
    text = "The keys and values of a layer are kept so that no token is computed twice. " * 12
    windows = torch.tensor(tokenizer(text)["input_ids"])[:160].reshape(4, 40)
    for one in (
        SharingMap.identity(30).share(17, 0),
        KVPlan.parse("_".join(map("{}q4s4".format, range(30)))),
    ):
        expected = Evaluator(exact, windows).score(one).kl
        assert Evaluator(model, windows).score(one).kl == pytest.approx(expected, rel=0.2)
