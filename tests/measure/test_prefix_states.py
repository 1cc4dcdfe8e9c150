"""States by prefix: found where maps agree, within the budget, the oldest leaves out first."""

import torch

from kvsharer_exp.measure.blocks import num_bytes
from kvsharer_exp.measure.prefix_states import LayerState, PrefixStates
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.exchange import KeyValue
from kvsharer_exp.values.plan import KVPlan

IDENTITY, LAST, MIDDLE, BOTH = (
    FittedPlan(KVPlan.parse(text)) for text in ("0_1_2_3", "0_1_2_0", "0_1_1_3", "0_1_1_0")
)


def states(count: int) -> list[LayerState]:
    """Of 4 bytes each."""
    return [LayerState(torch.zeros(1), None) for _ in range(count)]


def test_maps_that_agree_up_to_a_layer_share_its_state() -> None:
    kept, first, second = PrefixStates(1000), states(4), states(2)
    kept.keep(IDENTITY, first)
    assert kept.longest(LAST) == first[:3]
    kept.keep(MIDDLE, [*first[:2], *second])
    assert kept.longest(MIDDLE) == [*first[:2], *second]
    assert kept.longest(BOTH) == [*first[:2], second[0]]
    assert kept.nbytes == 6 * 4


def test_what_was_not_used_for_longest_goes_from_its_end() -> None:
    kept = PrefixStates(6 * 4)
    kept.keep(IDENTITY, states(4))
    kept.keep(MIDDLE, [*kept.longest(MIDDLE), *states(2)])
    kept.longest(IDENTITY)
    kept.keep(LAST, [*kept.longest(LAST), *states(1)])  # one too many: the end of MIDDLE's
    found = {m: len(kept.longest(m)) for m in (IDENTITY, MIDDLE, LAST)}
    assert found == {IDENTITY: 4, MIDDLE: 3, LAST: 4}
    assert kept.nbytes == 6 * 4


def test_nothing_fits_no_budget_and_one_map_can_be_left() -> None:
    none = PrefixStates(0)
    none.keep(IDENTITY, states(4))
    assert (none.longest(IDENTITY), none.nbytes) == ([], 0)
    kept = PrefixStates(1000)
    kept.keep(IDENTITY, states(4))
    kept.keep(MIDDLE, [*kept.longest(MIDDLE), *states(2)])
    kept.forget_all_but(MIDDLE)
    assert len(kept.longest(MIDDLE)) == 4
    assert len(kept.longest(IDENTITY)) == 2
    assert kept.nbytes == 4 * 4


def test_bytes_are_those_held_and_shared_ones_count_once() -> None:
    fused = torch.zeros(10)
    state = LayerState((torch.zeros(2), None), KeyValue(fused[:3], fused[3:6]))
    assert num_bytes(state.tensors) == 2 * 4 + 10 * 4
