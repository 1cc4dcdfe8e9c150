"""The peak of what is allocated counts temporaries, and nothing that was there before."""

import torch

from kvsharer_exp.measure.allocations import allocation_peak

CPU = torch.device("cpu")
MEBI = 2**20


def test_the_peak_counts_what_is_held_at_once() -> None:
    before = torch.zeros(4 * MEBI, dtype=torch.uint8)
    with allocation_peak(CPU) as peak:
        for _ in range(3):  # one after the other
            torch.zeros(2 * MEBI, dtype=torch.uint8)
        first = torch.zeros(MEBI, dtype=torch.uint8)
        second = torch.zeros(2 * MEBI, dtype=torch.uint8)
        del first, second, before
    assert 3 * MEBI <= peak[0] < 3 * MEBI + 4096


def test_temporaries_inside_an_operation_count() -> None:
    queries = torch.randn(1, 4, 512, 8)
    with allocation_peak(CPU) as peak:
        weights = (queries @ queries.transpose(-1, -2)).softmax(-1)
        weights @ queries
    assert peak[0] >= 2 * 4 * 512 * 512 * 4  # products and weights
    with allocation_peak(CPU) as kernel:
        torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)
    assert kernel[0] < peak[0] / 4
