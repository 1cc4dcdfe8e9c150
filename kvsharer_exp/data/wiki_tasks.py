"""Make tasks from text, because a hub with the usual benchmarks is not always at hand.

``wiki_cloze`` asks for the last word of an opening, as LAMBADA does. ``wiki_next`` asks which of
four continuations is the paragraph's own. ``wiki_ppl`` is the rolling perplexity.

Items are drawn by a seed. `local_tasks` finds the tasks by name, and gives each its twin on search
text.
LAMBADA: https://arxiv.org/abs/1606.06031.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import groupby

from kvsharer_exp.data.passages import Passage
from kvsharer_exp.data.task_items import Item, LocalTask, metrics

CLOZE_WORDS = range(40, 61)  # length of the context, in words
NEXT_CONTEXT_WORDS = 24
NEXT_CHOICE_WORDS = 8
NUM_CHOICES = 4
PERPLEXITY_WORDS = 200
_COMMON = frozenset(
    """about after also among been before being between both came could does during each even from
    have having here however into itself made many more most much only other over same several she
    should since some such than that their them themselves then there these they this those though
    through time under until upon used very well were what when where which while whom whose will
    with within without would year years your""".split()
)


def cloze_items(passages: Sequence[Passage], seed: int) -> list[Item]:
    """Make items ``{"context", "answer"}``: the opening of a passage, and the word after it.

    The context has 40 to 60 words. The answer has 4 or more letters and is not a function word.
    The context has used it already, but not among its last three words. If there is such a word
    at the end of a sentence, that word is taken.
    """
    rng = random.Random(seed)
    items = []
    for passage in passages:
        words = passage.text.split()
        bare = [re.sub(r"^\W+|\W+$", "", word) for word in words[: CLOZE_WORDS.stop]]
        places = [
            place
            for place in CLOZE_WORDS
            if place < len(words)
            and re.fullmatch(r"[A-Za-z]{4,}", bare[place])
            and words[place].startswith(bare[place])
            and bare[place].casefold() not in _COMMON
            and bare[place] in bare[: place - 3]
            and bare[place] not in bare[place - 3 : place]
        ]
        if places:
            last = [place for place in places if words[place].endswith((".", "!", "?"))]
            place = rng.choice(last or places)
            items.append({"context": " ".join(words[:place]), "answer": bare[place]})
    rng.shuffle(items)
    return items


def next_items(passages: Sequence[Passage], seed: int) -> list[Item]:
    """Make items ``{"context", "choices", "gold"}``: an opening, and four ways it might go on.

    One choice is how the paragraph does go on; ``gold`` is its index. The others are how other
    paragraphs of the same document go on after an opening of the same length. (Items with four
    openings for the end of a paragraph were tried first. Their accuracy was .35, which is too
    near chance to tell maps apart.)
    """
    rng = random.Random(seed)
    items = []
    for _, group in groupby(passages, key=lambda passage: passage.document):
        texts = [passage.text.split() for passage in group]
        texts = [words for words in texts if len(words) >= NEXT_CONTEXT_WORDS + NEXT_CHOICE_WORDS]
        answers = [" ".join(words[NEXT_CONTEXT_WORDS:][:NEXT_CHOICE_WORDS]) for words in texts]
        for place, words in enumerate(texts):
            others = sorted(set(answers) - {answers[place]})
            if len(others) < NUM_CHOICES - 1:
                continue
            choices = rng.sample(others, NUM_CHOICES - 1)
            gold = rng.randrange(NUM_CHOICES)
            choices.insert(gold, answers[place])
            context = " ".join(words[:NEXT_CONTEXT_WORDS])
            items.append({"context": context, "choices": choices, "gold": gold})
    rng.shuffle(items)
    return items


def perplexity_items(passages: Sequence[Passage], seed: int) -> list[Item]:
    """Make items ``{"text"}``: every passage, cut to its first 200 words."""
    items = [{"text": " ".join(p.text.split()[:PERPLEXITY_WORDS])} for p in passages]
    random.Random(seed).shuffle(items)
    return items


WIKI_TASKS: dict[str, LocalTask] = {
    "wiki_cloze": LocalTask(
        "report",
        cloze_items,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + answer}}",  # log-likelihood tasks get no delimiter
            "metric_list": metrics({"acc": "mean"}, True)
            + metrics({"perplexity": "perplexity"}, False),
        },
    ),
    "wiki_next": LocalTask(
        "report",
        next_items,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": metrics({"acc": "mean", "acc_norm": "mean"}, True),
        },
    ),
    "wiki_ppl": LocalTask(
        "report",
        perplexity_items,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": metrics(
                {
                    "word_perplexity": "weighted_perplexity",
                    "byte_perplexity": "weighted_perplexity",
                    "bits_per_byte": "bits_per_byte",
                },
                False,
            ),
        },
    ),
}
