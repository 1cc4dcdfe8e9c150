"""Public fault 18: tasks on a tokenizer that has no BOS and no EOS, or a pad token out of reach."""

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.tasks import load_tasks
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.load import load_model
from kvsharer_exp.values.errors import InputError
from tests.model.test_vocabulary import ROWS, bytes_tokenizer

NAMES = ("wiki_cloze", "wiki_next", "wiki_ppl")


@pytest.fixture(scope="module")
def parts() -> TextParts:
    return split_texts()


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny", device="cpu")[0]


@pytest.mark.parametrize("special", [{}, {"unk_token": "<unk>"}], ids=["none", "unk"])
def test_every_kind_of_likelihood_is_scored(model, parts: TextParts, special: dict) -> None:
    """lm-eval decodes BOS or EOS before it scores anything: of None, a TypeError."""
    tokenizer = bytes_tokenizer(**special)
    scorer = TaskScorer(model, tokenizer, load_tasks(NAMES, parts), limit=2, batch_size=2)
    scores = scorer.score()
    assert {name.split("/")[1] for name in scores} == set(NAMES)
    # The first token of a text is scored after a line break.
    asked = Instance("loglikelihood_rolling", {}, ("some text",), 0)
    ids = tokenizer("\nsome text", return_tensors="pt").input_ids
    with torch.no_grad():
        likelihoods = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    (scored,) = scorer._lm.loglikelihood_rolling([asked], disable_tqdm=True)
    assert scored == pytest.approx(likelihoods.sum().item(), rel=1e-5)


def test_a_task_that_generates_is_refused(model, parts: TextParts) -> None:
    tasks = load_tasks(("wiki_cloze",), parts)
    tasks["wiki_cloze"].OUTPUT_TYPE = "generate_until"
    with pytest.raises(InputError, match="generates until EOS, but the tokenizer has no EOS"):
        TaskScorer(model, bytes_tokenizer(), tasks)


def test_a_tokenizer_with_no_token_to_begin_with_is_refused(model, parts: TextParts) -> None:
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])))
    with pytest.raises(InputError, match="has no BOS, EOS or line break"):
        TaskScorer(model, empty, load_tasks(("wiki_cloze",), parts))


def test_a_pad_token_beyond_the_model_is_not_looked_up(model, parts: TextParts) -> None:
    """Answers are generated in batches that are padded: an IndexError in the middle."""
    tokenizer = bytes_tokenizer(between=1, bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == ROWS
    scorer = TaskScorer(model, tokenizer, load_tasks(("wiki_cloze",), parts), batch_size=2)
    contexts = ("a", "a longer one")
    how = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, dict(how)), 0) for text in contexts]
    together = scorer._lm.generate_until(asked, disable_tqdm=True)
    alone = [scorer._lm.generate_until([one], disable_tqdm=True)[0] for one in asked]
    assert together == alone
    assert tokenizer.pad_token_id == ROWS  # the caller's is as it was
