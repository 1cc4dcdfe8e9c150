"""Public fault 18: tokenizers that are larger than the model, or have no BOS and no EOS."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvsharer_exp.model.describe import adds_bos
from kvsharer_exp.model.load import load, load_model
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.values.errors import InputError

ROWS = 259  # of the tiny model's embedding table
NAMED = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def bytes_tokenizer(between: int = 0, **special: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, the ``special`` ones first, and so many others ``between`` them."""
    others = [f"<other{index}>" for index in range(between)]
    alphabet = [*special.values(), *others, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def saved(folder: Path, tokenizer: Any) -> ModelSpec:
    model, _ = load_model("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(name="m", source=str(folder))


def extended(*tokens: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer = bytes_tokenizer(**NAMED)
    assert len(tokenizer) == ROWS
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [
        (bytes_tokenizer(between=1, **NAMED), 260),
        (bytes_tokenizer(between=150, **NAMED), 409),
        (extended(AddedToken("<mine>", special=False)), 260),
    ],
    ids=["by one", "by many", "by a token that text can hold"],
)
def test_a_tokenizer_larger_than_the_model_is_refused_at_load(
    tokenizer: Any, size: int, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"has {size} tokens but .* table {ROWS} rows") as refused:
        load(saved(tmp_path, tokenizer))
    assert len(str(refused.value)) <= 200


def test_a_first_token_beyond_the_model_is_refused(tmp_path: Path) -> None:
    """Texts and tasks begin with BOS, or with EOS where there is no BOS."""
    for which in ("bos_token", "eos_token"):
        tokenizer = bytes_tokenizer(between=3)
        tokenizer.add_special_tokens({which: "<first>"})
        with pytest.raises(InputError, match="has 260 tokens but"):
            load(saved(tmp_path / which, tokenizer))


@pytest.mark.parametrize(
    "tokenizer",
    [
        extended(AddedToken("<image>", special=True)),
        bytes_tokenizer(),
        bytes_tokenizer(unk_token="<unk>"),
    ],
    ids=["special beyond", "no special", "unknown only"],
)
def test_what_can_work_is_loaded(tokenizer: Any, tmp_path: Path) -> None:
    spec = saved(tmp_path, tokenizer)
    model, loaded = load(spec)
    assert len(loaded) == len(tokenizer)
    assert not adds_bos(spec, loaded)
    assert model.get_input_embeddings().weight.shape[0] == ROWS


def test_a_bos_that_is_not_there_is_not_added() -> None:
    spec = ModelSpec(name="m", source="random:tiny", add_bos_token=True)
    with pytest.raises(InputError, match="the tokenizer has no BOS token: set it to false"):
        adds_bos(spec, bytes_tokenizer())
    assert adds_bos(spec, bytes_tokenizer(**NAMED))


def test_a_tokenizer_that_makes_nothing_of_a_letter_adds_no_bos() -> None:
    empty = Tokenizer(models.BPE({"<bos>": 0}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, bos_token="<bos>")
    assert tokenizer("a").input_ids == []
    assert not adds_bos(ModelSpec(name="m", source="random:tiny"), tokenizer)
