"""Check that a tokenizer and a model fit: each token that text can become has an embedding.

`load` calls `check_vocabulary`. Without it a tokenizer that is too large would end a command in the
middle, at the first text with such a token.
"""

from __future__ import annotations

from typing import Any

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten


def check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse the model ``name`` if ordinary text may have tokens beyond its embedding table.

    Special tokens may lie beyond it, as Gemma's for images do, for no plain text becomes them. The
    one that a text or a task begins with may not: BOS, or EOS where there is no BOS.

    Raises:
        InputError: there are such tokens; the message holds both sizes.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    special = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ids = set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    largest = max(ids if first is None else ids | {first}, default=0)
    if largest >= rows:
        raise InputError(
            f"{shorten(name)}: the tokenizer has {max(len(tokenizer), largest + 1)} tokens but the "
            f"model's embedding table {rows} rows: give the tokenizer that the model was made with"
        )
