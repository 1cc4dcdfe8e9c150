"""A window holds the tokens that a plain list of them says, at every step and in every row."""

import pytest
import torch

from kvsharer_exp.model.stores.registry import make_store
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.window import Window

CPU = torch.device("cpu")


def tagged(batch: int, first: int, count: int) -> torch.Tensor:
    """Keys (batch, 1, count, 8) whose every number is the number of its token."""
    tokens = torch.arange(first, first + count, dtype=torch.float32)
    return tokens[None, None, :, None].expand(batch, 1, count, 8)


def read_by(token: int, pad: int, sinks: int, recent: int, window: int | None) -> list[int]:
    """StreamingLLM by its definition: what a token reads, in a row whose text begins at ``pad``."""
    return [
        t
        for t in range(pad, token + 1)
        if (t - pad < sinks or t > token - recent) and (window is None or t > token - window)
    ]


def test_every_query_reads_the_tokens_of_the_definition() -> None:
    """Two hundred random windows, paddings and cuts of the text."""
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for _ in range(200):
        sinks, recent = number(0, 6), number(1, 9)
        window = number(recent + 1, 12) if number(0, 1) else None
        pads = [0, number(0, 7), number(0, 7)]
        store, seen = make_store(Own(keep=Window(sinks, recent)), window), 0
        while seen < 30:
            count = number(1, 7)
            columns = store.prepare(count, torch.tensor(pads), CPU)
            keys, values = store.update(tagged(3, seen, count), -tagged(3, seen, count))
            offset = 0 if window is None else max(0, seen - window + 1)
            for row, pad in enumerate(pads):
                for query in range(max(pad, seen), seen + count):
                    if columns is None:
                        held = list(range(offset, seen + count))
                        assert keys[row, 0, :, 0].tolist() == held
                        shown = [t for t in held if pad <= t <= query]
                        shown = [t for t in shown if window is None or t > query - window]
                    else:
                        visible = columns.visible()
                        visible = visible[row % len(visible), 0, query - seen]
                        index = columns.index[row % len(columns.index)] + offset
                        # The model's mask hides padding, and what its window has passed.
                        model = (index >= pad) & (index <= query)
                        if window is not None:
                            model &= index > query - window
                        shown = keys[row, 0, visible & model, 0].int().tolist()
                        assert index[visible & model].tolist() == shown
                    assert sorted(shown) == read_by(query, pad, sinks, recent, window)
            assert torch.equal(values, -keys)
            seen += count


@pytest.mark.parametrize("window", [None, 9, 20])
@pytest.mark.parametrize(
    "text", ["0w2+5", "0w0+1", "0w7+3", "0q4g8w2+5", "0q2g8w8+4", "0q3g16w1+8"]
)
def test_bytes_are_those_predicted_at_every_length(text: str, window: int | None) -> None:
    own = Own.read(text, 0)
    assert own is not None and own.keep is not None
    store = make_store(own, window)
    for context in range(1, 50):
        store.prepare(1, None, CPU)
        store.update(tagged(2, context - 1, 1), tagged(2, context - 1, 1))
        passed = 0 if window is None else max(0, context - window + 1)
        sinks = own.keep.sinks if passed < own.keep.sinks else 0
        first = max(passed, own.keep.first_recent(context))
        shape = (context, first, 1, 8, 4, sinks)
        expected = own.precision.key_bytes(*shape) + own.precision.value_bytes(*shape)
        assert sum(t.nbytes for t in store.tensors) == 2 * expected, context
        if not own.quantised:
            assert store.tensors[0].shape[2] <= own.keep.tokens
    assert store.get_seq_length() == 49
