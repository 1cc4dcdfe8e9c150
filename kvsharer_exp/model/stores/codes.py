"""Quantise numbers to a few bits, and pack the codes without a gap.

The store of quantised owners (`layer`) uses it. Numbers that lie along the last axis of a tensor
share a scale and a minimum, which are rounded to 16 bits before the codes are made. So what is read
is always what was stored: ``code * scale + minimum``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvsharer_exp.values.precision import Precision

_LARGEST = torch.finfo(torch.float16).max


class Quantised(NamedTuple):
    """Codes (…, n) in uint8, packed or not, with scale and minimum (…) in float16."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


def quantise(numbers: torch.Tensor, bits: int) -> Quantised:
    """Code ``numbers`` (…, n) in ``bits`` each; they are taken in float32.

    Where float16 does not reach their minimum or scale, they become the nearest that can be read.
    """
    numbers = numbers.float()
    minimum = numbers.amin(-1).clamp(-_LARGEST, _LARGEST)
    scale = ((numbers.amax(-1) - minimum) / (2**bits - 1)).clamp(0, _LARGEST).half()
    minimum = minimum.half()
    step = scale.float().unsqueeze(-1)
    codes = (numbers - minimum.float().unsqueeze(-1)) / torch.where(step == 0, 1, step)
    return Quantised(codes.round_().clamp_(0, 2**bits - 1).byte(), scale, minimum)


def dequantise(stored: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (…, n) that unpacked codes stand for, computed in float32."""
    codes, scale, minimum = stored
    numbers = (codes * scale.float().unsqueeze(-1)).add_(minimum.float().unsqueeze(-1))
    if dtype == torch.float16:  # a rounded scale may go past its end
        numbers.clamp_(-_LARGEST, _LARGEST)
    return numbers.to(dtype)


def code_tokens(numbers: torch.Tensor, precision: Precision, *, packed: bool) -> Quantised:
    """Code ``numbers`` (batch, heads, tokens, channels) by token, over neighbouring channels.

    The codes of a token lie along one last axis; scales and minima are one for each group.
    """
    groups = numbers.unflatten(-1, (-1, precision.channels(numbers.shape[-1])))
    made = quantise(groups, precision.bits)
    codes = made.codes.flatten(-2)
    return made._replace(codes=pack(codes, precision.bits) if packed else codes)


def read_tokens(
    held: Quantised, precision: Precision, head_dim: int, dtype: torch.dtype, *, packed: bool
) -> torch.Tensor:
    """Undo `code_tokens`."""
    codes = unpack(held.codes, precision.bits) if packed else held.codes
    groups = codes.unflatten(-1, (-1, precision.channels(head_dim)))
    return dequantise(held._replace(codes=groups), dtype).flatten(-2)


def joined(held: Quantised, new: Quantised) -> Quantised:
    """``held`` with the tokens or groups of ``new`` behind it."""
    return Quantised(*(torch.cat(pair, 2) for pair in zip(held, new, strict=True)))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (…, n), n a multiple of 8, into (…, n * bits / 8) bytes.

    Eight codes become ``bits`` bytes, of which byte j holds bit j of each.
    """
    if bits == 8:
        return codes
    planes = codes.unflatten(-1, (-1, 1, 8)) >> _counting(bits, codes).unsqueeze(-1) & 1
    return (planes << _counting(8, codes)).sum(-1, dtype=torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `pack`: (…, m) bytes become codes (…, m * 8 / bits)."""
    if bits == 8:
        return packed
    planes = packed.unflatten(-1, (-1, bits, 1)) >> _counting(8, packed) & 1
    return (planes << _counting(bits, packed).unsqueeze(-1)).sum(-2, dtype=torch.uint8).flatten(-2)


def _counting(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)
