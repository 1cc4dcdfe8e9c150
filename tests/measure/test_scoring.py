"""lm-eval on the live model, retained quality, perplexity on windows."""

import logging
import math
import random
from typing import Any

import pytest
import torch

from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.tasks import load_tasks
from kvsharer_exp.measure.perplexity import perplexity
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.load import load_model
from kvsharer_exp.model.sharing.runtime import apply_plan, share_kv
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import higher_is_better, retained
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import room_for

NAMES = ("wiki_cloze", "wiki_next", "wiki_ppl")
LIMIT = 4


@pytest.fixture(scope="module")
def parts() -> TextParts:
    return split_texts()


@pytest.fixture(scope="module")
def tasks(parts: TextParts) -> dict[str, Any]:
    return load_tasks(NAMES, parts)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny")


@pytest.fixture(scope="module")
def scorer(tiny: tuple[Any, Any], tasks: dict[str, Any]) -> TaskScorer:
    return TaskScorer(*tiny, tasks, limit=LIMIT, batch_size=4, add_bos_token=False)


def log_likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> tuple[float, bool]:
    """The plain way: one sequence at a time."""
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokenizer(context + answer, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(before) - 1 : -1].float()
    answer_ids = ids[0, len(before) :]
    picked = logits.log_softmax(-1).gather(1, answer_ids[:, None])
    return picked.sum().item(), bool((logits.argmax(-1) == answer_ids).all())


def test_scores_repeat_and_are_named(scorer: TaskScorer) -> None:
    first, samples = scorer.score(), scorer.samples
    assert set(first) == {
        "lm_eval/wiki_cloze/acc",
        "lm_eval/wiki_cloze/perplexity",
        "lm_eval/wiki_next/acc",
        "lm_eval/wiki_next/acc_norm",
        "lm_eval/wiki_ppl/word_perplexity",
        "lm_eval/wiki_ppl/byte_perplexity",
        "lm_eval/wiki_ppl/bits_per_byte",
    }
    assert set(samples) == set(NAMES)
    assert all(len(values) == LIMIT for values in samples.values())
    assert set(scorer.stderr()) == set(first)
    random.random(), torch.rand(1)
    assert scorer.score() == first
    assert scorer.samples == samples


def test_items_go_through_in_smaller_batches_when_memory_runs_out(
    scorer: TaskScorer, tiny: tuple[Any, Any], tasks: dict[str, Any]
) -> None:
    some = {"wiki_next": tasks["wiki_next"]}
    small = TaskScorer(*tiny, some, limit=LIMIT, batch_size=4, add_bos_token=False)
    with room_for(tiny[0], 2) as tried:
        found = small.score()
    assert (tried[0], max(tried[1:])) == (4, 2)
    expected = scorer.score()
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)


def test_scores_are_those_of_the_plain_way(
    scorer: TaskScorer, tiny: tuple[Any, Any], tasks: dict[str, Any]
) -> None:
    scores = scorer.score()
    cloze = [
        log_likelihood(*tiny, item["context"], " " + item["answer"])
        for item in list(tasks["wiki_cloze"].eval_docs)[:LIMIT]
    ]
    assert scores["lm_eval/wiki_cloze/acc"] == sum(greedy for _, greedy in cloze) / LIMIT
    assert scores["lm_eval/wiki_cloze/perplexity"] == pytest.approx(
        math.exp(-sum(value for value, _ in cloze) / LIMIT), rel=1e-4
    )
    right = 0
    for item in list(tasks["wiki_next"].eval_docs)[:LIMIT]:
        values = [
            log_likelihood(*tiny, item["context"], " " + choice)[0] for choice in item["choices"]
        ]
        right += values.index(max(values)) == item["gold"]
    assert scores["lm_eval/wiki_next/acc"] == right / LIMIT


def test_an_item_under_a_quantised_plan_scores_as_alone(
    scorer: TaskScorer, tiny: tuple[Any, Any], tasks: dict[str, Any]
) -> None:
    """Groups and scales hold tokens of one row only, and never what pads it in a batch."""
    single = TaskScorer(*tiny, tasks, limit=LIMIT, batch_size=1, add_bos_token=False)
    plain = scorer.score()
    with apply_plan(tiny[0], KVPlan.parse("0q2g8_1q2g8s2_2q3g8_0_4q2g16_5q4g8")):
        together, alone = scorer.score(), single.score()
    assert together != plain
    assert together == pytest.approx(alone, rel=1e-4)
    for name, items in scorer.item_scores.items():
        assert items == pytest.approx(single.item_scores[name], rel=1e-4)


def test_the_values_of_the_items_add_up_to_the_score(scorer: TaskScorer) -> None:
    scores = scorer.score()
    assert set(scorer.item_scores) == set(scores)
    for name, values in scorer.item_scores.items():
        assert len(values) == LIMIT
        if name.endswith(("/acc", "/acc_norm")):
            assert sum(values) / LIMIT == pytest.approx(scores[name])
    likelihoods = scorer.item_scores["lm_eval/wiki_cloze/perplexity"]
    assert math.exp(-sum(likelihoods) / LIMIT) == pytest.approx(
        scores["lm_eval/wiki_cloze/perplexity"]
    )
    assert scorer.samples["wiki_cloze"] == scorer.item_scores["lm_eval/wiki_cloze/acc"]
    assert scorer.samples["wiki_ppl"] == scorer.item_scores["lm_eval/wiki_ppl/word_perplexity"]


def test_the_standard_error_of_a_perplexity_is_near_the_bootstrap(scorer: TaskScorer) -> None:
    from kvsharer_exp.measure.item_scores import standard_error

    draw = random.Random(0)
    items = [(-draw.gauss(300, 60), draw.randint(80, 120)) for _ in range(200)]

    def score(chosen: list[tuple[float, int]]) -> float:
        return math.exp(-sum(v for v, _ in chosen) / sum(w for _, w in chosen))

    resampled = [score(draw.choices(items, k=len(items))) for _ in range(1000)]
    centre = sum(resampled) / 1000
    bootstrap = math.sqrt(sum((value - centre) ** 2 for value in resampled) / 999)
    assert standard_error("word_perplexity", score(items), items, True) == pytest.approx(
        bootstrap, rel=0.1
    )


def test_canary_a_model_that_changes_changes_its_scores(
    scorer: TaskScorer, tiny: tuple[Any, Any]
) -> None:
    before = scorer.score()
    attention = tiny[0].model.layers[0].self_attn
    hook = attention.register_forward_hook(
        lambda module, inputs, output: (torch.zeros_like(output[0]), *output[1:])
    )
    try:
        changed = scorer.score()
    finally:
        hook.remove()
    for name in ("wiki_cloze/perplexity", "wiki_ppl/word_perplexity"):
        assert changed[f"lm_eval/{name}"] != before[f"lm_eval/{name}"]
    assert scorer.score() == before


def test_canary_a_destructive_map_destroys_the_real_model(parts: TextParts) -> None:
    """A map that is not seen by lm-eval would leave the scores as they are."""
    model, tokenizer = load_model("smollm2")
    scorer = TaskScorer(
        model,
        tokenizer,
        load_tasks(["wiki_cloze_search"], parts),
        limit=4,
        batch_size=4,
        add_bos_token=False,
    )
    name = "lm_eval/wiki_cloze_search/perplexity"
    full = scorer.score()
    with share_kv(model, SharingMap.identity(model.config.num_hidden_layers)):
        assert scorer.score() == full
    with share_kv(model, SharingMap((0,) * model.config.num_hidden_layers)):
        assert scorer.score()[name] > 10 * full[name]
    assert scorer.score() == full


def test_lm_eval_is_quiet_and_gets_its_voice_back(
    scorer: TaskScorer, capfd: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.models.huggingface as module

    logger = logging.getLogger("lm_eval")
    before = (logger.level, module.tqdm)
    scorer.score()
    assert (logger.level, module.tqdm) == before
    assert capfd.readouterr().err == ""


def test_the_callers_tokenizer_and_random_state_are_left_alone(
    tiny: tuple[Any, Any], tasks: dict[str, Any]
) -> None:
    model, tokenizer = tiny
    pad, states = tokenizer.pad_token_id, (random.getstate(), torch.get_rng_state())
    TaskScorer(model, tokenizer, tasks, limit=1, add_bos_token=False).score()
    assert tokenizer.pad_token_id == pad
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_metric_that_is_no_number_is_an_error(
    tiny: tuple[Any, Any], tasks: dict[str, Any]
) -> None:
    model, tokenizer = tiny
    scorer = TaskScorer(
        model, tokenizer, {"wiki_ppl": tasks["wiki_ppl"]}, limit=2, add_bos_token=False
    )
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * math.nan)
    try:
        with pytest.raises(NotFiniteError, match=r"lm_eval/wiki_ppl/word_perplexity is nan"):
            scorer.score()
        with pytest.raises(NotFiniteError, match="in window 0 in the logits"):
            perplexity(model, torch.ones(1, 4, dtype=torch.long))
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("options", "says"),
    [((0, 8), "limit=0"), ((None, 0), "batch_size=0")],
)
def test_numbers_below_one_are_refused(
    tiny: tuple[Any, Any], tasks: dict[str, Any], options: tuple[int | None, int], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        TaskScorer(*tiny, tasks, limit=options[0], batch_size=options[1])
    with pytest.raises(InputError, match="no lm-eval task"):
        TaskScorer(*tiny, {})


def test_perplexity_is_that_of_the_plain_way(tiny: tuple[Any, Any]) -> None:
    model = tiny[0]
    windows = torch.randint(0, model.config.vocab_size, (5, 12), generator=torch.manual_seed(0))
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in windows]
    for batch_size in (1, 2, 8):
        assert perplexity(model, windows, batch_size) == pytest.approx(
            math.exp(sum(losses) / 5), rel=1e-5
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("perplexity/wikipedia", False),
        ("kl", False),
        ("cosine", True),
        ("lm_eval/wiki_cloze/acc", True),
        ("lm_eval/wiki_cloze/perplexity", False),
        ("lm_eval/wiki_ppl/word_perplexity", False),
        ("lm_eval/wiki_ppl/bits_per_byte", False),
        ("lm_eval/my_perplexity_task/acc", True),
        ("lm_eval/gsm8k/exact_match.strict-match", True),
    ],
)
def test_which_way_is_up(name: str, expected: bool) -> None:
    assert higher_is_better(name) is expected


def test_local_tasks_agree_on_which_way_is_up(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        for metric, upwards in task.higher_is_better().items():
            assert higher_is_better(f"lm_eval/{name}/{metric}") is upwards


def test_retained_is_a_share_of_the_full_cache() -> None:
    full = {
        "kl": 0.0,
        "cosine": 1.0,
        "perplexity/a": 20.0,
        "lm_eval/t/acc": 0.8,
        "lm_eval/u/acc": 0,
    }
    scores = {
        "kl": 0.3,
        "cosine": 0.9,
        "perplexity/a": 25.0,
        "lm_eval/t/acc": 0.6,
        "lm_eval/u/acc": 0.1,
        "lm_eval/only_here/acc": 0.5,
    }
    assert retained(scores, full) == {
        "perplexity/a": pytest.approx(0.8),
        "lm_eval/t/acc": pytest.approx(0.75),
    }
    assert set(retained(full, full).values()) == {1.0}
