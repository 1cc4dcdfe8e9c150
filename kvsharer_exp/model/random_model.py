"""A tiny random model that needs no download, for tests and first steps.

`load` makes it for ``model.source=random:tiny``.
"""

from __future__ import annotations

from typing import Any

from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.values.errors import InputError


def random_model(spec: ModelSpec, kind: str) -> tuple[Any, Any]:
    """Make a 6-layer llama with random weights, and a byte-level tokenizer: (model, tokenizer).

    Raises:
        InputError: ``kind`` is not ``tiny``.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if kind != "tiny":
        raise InputError(f"model.source=random:{kind} is unknown: use random:tiny")
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if spec.attn_implementation:
        config._attn_implementation = spec.attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the usual initial size gives nearly uniform logits
                parameter.data.mul_(4)
    return model if spec.dtype == "auto" else model.to(getattr(torch, spec.dtype)), tokenizer
