"""Codes are packed without loss, and stored KV is what its precision says."""

import pytest
import torch

from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.stores.codes import dequantise, pack, quantise, unpack
from kvsharer_exp.model.stores.packed import PackedLayer
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.precision import BITS


@pytest.mark.parametrize("bits", BITS[:-1])
def test_packing_is_lossless_and_has_no_gaps(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 32), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 32 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS[:-1])
def test_numbers_come_back_within_half_a_step_of_rounded_scales(bits: int) -> None:
    numbers = torch.randn(4, 6, 32) * 3 - 1
    made = quantise(numbers, bits)
    step = (numbers.amax(-1) - numbers.amin(-1)) / (2**bits - 1)
    error = (dequantise(made, torch.float32) - numbers).abs().amax(-1)
    assert (error <= 0.5 * step + 2e-3 * numbers.abs().amax(-1)).all()
    assert made.scale.dtype == made.minimum.dtype == torch.float16
    again = dequantise(made, torch.float32)
    assert torch.equal(again, dequantise(quantise(numbers, bits), torch.float32))


@pytest.mark.parametrize("bits", BITS[:-1])
def test_numbers_that_float16_does_not_reach_stay_finite_and_near(bits: int) -> None:
    largest = torch.finfo(torch.float16).max
    near = torch.tensor([[1e5] * 8, [-3.0, 1e5, *[0.0] * 6], [-1e5, *[5e4] * 7], [-1e5] * 8])
    read = dequantise(quantise(near.bfloat16(), bits), torch.bfloat16).float()
    step = (near.amax(-1) - near.amin(-1).clamp(-largest, largest)).clamp(0) / (2**bits - 1)
    error = (read - near.clamp(min=-largest)).abs().amax(-1)
    assert (error <= 0.5 * step + 1e-2 * near.abs().amax(-1)).all()
    extreme = torch.tensor([[3e38, -3e38, *[0.0] * 6], [-3e38] * 8])
    assert dequantise(quantise(extreme, bits), torch.float32).isfinite().all()
    ends = torch.tensor([[-100.0, *[largest] * 7], [-largest, *[largest] * 7]]).half()
    assert dequantise(quantise(ends, bits), torch.float16).isfinite().all()


def test_a_channel_that_never_changes_is_exact() -> None:
    numbers = torch.full((2, 8), 0.25)
    assert torch.equal(dequantise(quantise(numbers, 2), torch.float32), numbers)


def kv(length: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, length, 16)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_what_is_read_does_not_depend_on_how_the_text_is_cut() -> None:
    own = Own(3, 8, 2)
    key, value = kv(29, 0)
    read = {}
    for parts in ([29], [5, 11, 13], [1] * 29):
        layer, start = PackedLayer(own), 0
        for length in parts:
            layer.prepare(length, None, key.device)
            part = slice(start, start + length)
            keys, values = layer.update(key[:, :, part], value[:, :, part])
            start += length
        stored = keys[:, :, : layer.cumulative_length // 8 * 8][:, :, :24]
        read[tuple(parts)] = stored, values
    first, *others = read.values()
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    assert torch.equal(first[0][:, :, :2], key[:, :, :2])  # sinks in full
    assert torch.equal(first[1][:, :, :2], value[:, :, :2])
    assert not torch.equal(first[0][:, :, 2:24], key[:, :, 2:24])


@pytest.mark.parametrize("window", [None, 5, 12, 40])
@pytest.mark.parametrize("own", [Own(2, 8), Own(3, 16, 16), Own(4, 8, 3)], ids=str)
def test_bytes_are_those_predicted_at_every_length(own: Own, window) -> None:
    layer, precision = PackedLayer(own, window), own.precision
    for context in range(1, 45):
        layer.prepare(1, None, torch.device("cpu"))
        layer.update(*kv(1, context))
        first = 0 if window is None else max(0, context - window + 1)
        shape = (context, first, 3, 16, 4)
        predicted = 2 * (precision.key_bytes(*shape) + precision.value_bytes(*shape))
        assert sum(t.nbytes for t in layer.tensors) == predicted, context


def test_rows_can_be_chosen_repeated_reordered_and_moved() -> None:
    own = Own(4, 8, 2)

    def filled(rows: list[int]) -> PackedLayer:
        layer = PackedLayer(own)
        layer.prepare(21, torch.tensor([0, 3])[rows], torch.device("cpu"))
        key, value = kv(21, 1)
        layer.update(key[rows], value[rows])
        return layer

    def then(layer: PackedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        layer.prepare(1, None, torch.device("cpu"))
        key, value = kv(1, 2, batch=1)
        rows = len(layer.tensors[0])
        return layer.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1))

    for change, rows in (
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda layer: (layer.offload(), layer.prefetch()), [0, 1]),
    ):
        layer = filled([0, 1])
        change(layer)
        for changed, expected in zip(then(layer), then(filled(rows)), strict=True):
            # A row that never was in a batch with a longer one has fewer columns that are masked.
            assert torch.equal(changed[:, :, -1:], expected[:, :, -1:])
            assert torch.equal(changed[:, :, :16], expected[:, :, :16])


def test_it_is_not_used_by_mistake_and_does_not_go_back() -> None:
    layer = PackedLayer(Own(4))
    with pytest.raises(SharingError, match="run the model under that plan"):
        layer.update(*kv(3, 0))
    with pytest.raises(SharingError, match="assisted decoding"):
        layer.crop(-1)
