"""Cut passages into token windows of equal length for a model.

The `Windows` of a command are cut here. This module does not know models: the tokenizer comes in
from outside.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from kvsharer_exp.data.passages import Passage
from kvsharer_exp.values.errors import InputError


def token_windows(
    passages: Sequence[Passage],
    tokenizer: Any,
    *,
    num_windows: int,
    window_tokens: int,
    seed: int,
    at_most: bool = False,
    add_bos: bool = False,
) -> torch.Tensor:
    """Cut windows of equal length, ``(num_windows, window_tokens)`` int64; none overlaps another.

    Paragraphs of a document that are shorter than a window are joined with a blank line into a
    stretch. Every stretch gives its first window before any stretch gives a second one. The order
    of the stretches is drawn by ``seed``.

    Args:
        at_most: give fewer windows, even none, if the text has no more.
        add_bos: make the tokenizer's BOS the first of the ``window_tokens``.

    Raises:
        InputError: a number is out of range, the tokenizer has no BOS token, or there is too
            little text.
    """
    if num_windows < 1 or window_tokens < 2:
        raise InputError(
            f"{num_windows} windows of {window_tokens} tokens: "
            "give at least 1 window of at least 2 tokens"
        )
    if add_bos and tokenizer.bos_token_id is None:
        raise InputError("add_bos_token=true but the tokenizer has no BOS token: set it to false")
    bos = [tokenizer.bos_token_id] if add_bos else []
    body = window_tokens - len(bos)
    stretches = list(_stretches(passages, tokenizer, body))
    available = sum(len(stretch) // body for stretch in stretches)
    if available < num_windows and not at_most:
        raise InputError(
            f"text gives {available} windows of {window_tokens} tokens, {num_windows} are asked: "
            "give more text, or fewer or shorter windows"
        )
    random.Random(seed).shuffle(stretches)
    num_windows = min(num_windows, available)
    windows: list[list[int]] = []
    start = 0
    while len(windows) < num_windows:
        full = (s[start : start + body] for s in stretches if len(s) >= start + body)
        windows += [bos + tokens for tokens in full]
        start += body
    return torch.tensor(windows[:num_windows], dtype=torch.long).view(-1, window_tokens)


class RememberingTokenizer:
    """A tokenizer for `token_windows` that reads each text once, however often it is cut."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos_token_id = tokenizer.bos_token_id
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        """The ids of ``texts``, not to be changed; ``options`` have to be the same always."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            made = self._tokenizer(new, return_attention_mask=False, **options)["input_ids"]
            self._known |= zip(new, made, strict=True)
        return {"input_ids": [self._known[text] for text in texts]}


def _stretches(passages: Sequence[Passage], tokenizer: Any, body: int) -> Iterator[list[int]]:
    """Yield stretches: token ids of consecutive paragraphs of one document, at least ``body``."""

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    for _, group in groupby(passages, key=lambda passage: passage.document):
        texts = [passage.text for passage in group]
        joined: list[tuple[list[str], list[int]]] = []
        open_texts: list[str] = []
        length = 0
        for text, ids in zip(texts, encode(texts), strict=True):
            open_texts.append(text)
            length += len(ids)
            if length >= body:
                ids = ids if len(open_texts) == 1 else encode(["\n\n".join(open_texts)])[0]
            if len(ids) >= body:
                joined.append((open_texts, ids))
                open_texts, length = [], 0
        if open_texts and joined:  # the rest is too short for a stretch of its own
            texts = joined[-1][0] + open_texts
            joined[-1] = (texts, encode(["\n\n".join(texts)])[0])
        yield from (ids for _, ids in joined)
