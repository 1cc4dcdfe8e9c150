"""A block of queries reads what the rule for all queries says, and has few columns beside that."""

import pytest
import torch

from kvsharer_exp.model.stores.columns import Columns, ColumnsAfterPrompt
from kvsharer_exp.model.stores.registry import make_store
from kvsharer_exp.values.actions.own import Own

CPU = torch.device("cpu")


def lay_out(text: str, counts: list[int], pads: list[int], window: int | None) -> list[Columns]:
    own = Own.read(text, 0)
    assert own is not None
    store, found = make_store(own, window), []
    for count in counts:
        found.append(store.prepare(count, torch.tensor(pads), CPU))
        kv = torch.zeros(len(pads), 1, count, 8)
        store.update(kv, kv)
    return [columns for columns in found if columns is not None]


@pytest.mark.parametrize("window", [None, 23])
@pytest.mark.parametrize("text", ["0w2+5", "0w0+9", "0q4g8", "0q3g16s4", "0q4g8w2+5", "0q2g8w8+11"])
def test_blocks_are_the_rule_for_all_queries(text: str, window: int | None) -> None:
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for _ in range(25):
        pads = [0, number(0, 9), number(0, 9)][: number(1, 3)]
        counts = [number(1, 40), *(number(1, 9) for _ in range(4)), number(20, 40)]
        for columns in lay_out(text, counts, pads, window):
            whole = columns.visible()
            for first in range(0, whole.shape[2], 4):
                end = min(first + 4, whole.shape[2])
                read = columns.reach(first, end)
                block = torch.zeros_like(whole[:, :, first:end])
                block[..., read] = columns.visible(first, end, read)
                assert torch.equal(block, whole[:, :, first:end])
                assert read.tolist() == sorted(set(read.tolist()))
                mask = columns.mask(None, False, torch.float32, first=first, end=end, columns=read)
                assert torch.equal(mask, whole[:, :, first:end, read])


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("0w4+60", 4 + 60 + 32),  # sinks, recent ones and the block
        ("0q4g16", 1024 + 16 + 32),  # every token once, and a group more in full
        ("0q4g16w4+60", 4 + 60 + 32 + 3 * 16),
    ],
)
def test_a_block_leaves_out_what_none_of_its_queries_reads(text: str, most: int) -> None:
    (columns,) = lay_out(text, [1024], [0], None)
    widths = [len(columns.reach(first, first + 32)) for first in range(0, 1024, 32)]
    assert max(widths) <= most
    if "w" not in text:  # causal: what comes later is left out as well
        assert sum(widths) < 0.6 * 32 * 1024


def test_the_columns_of_a_prompt_are_a_rule_and_hold_no_mask_of_it() -> None:
    """A mask of the whole prompt was kept for every layer, beside KV a tenth of its size."""
    prompt, past, later, count = 300, 40, 8, 20
    read = torch.rand(2, 4, later, count, generator=torch.Generator().manual_seed(0)) < 0.5
    columns = ColumnsAfterPrompt(
        index=torch.arange(prompt + count).expand(2, -1), prompt=prompt, past=past, read=read
    )
    here = prompt - past
    whole = torch.zeros(2, 4, here + later, prompt + count, dtype=torch.bool)
    whole[:, :, :here, :prompt] = torch.arange(prompt) <= past + torch.arange(here)[:, None]
    whole[:, :, here:, prompt:] = read
    assert torch.equal(columns.visible(), whole)
    for first, end in ((0, 64), (64, here), (here - 3, here + 5), (here, here + later)):
        reach = columns.reach(first, end)
        assert torch.equal(columns.visible(first, end, reach), whole[:, :, first:end, reach])
        rest = torch.ones(prompt + count, dtype=torch.bool).index_fill(0, reach, False)
        assert not whole[:, :, first:end, rest].any()
    assert sum(tensor.numel() for tensor in columns.tensors) < 3 * (prompt + count) + read.numel()
