"""Memory that runs out makes batches smaller, wherever plans are scored."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kvsharer_exp.measure.batch_size import BatchSize
from kvsharer_exp.measure.calibration import block_errors, layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.fits import fit_actions
from kvsharer_exp.measure.held_out import HeldOutScorer
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.constant import Constant
from tests.tiny import room_for, some_map, tiny_model

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
WINDOWS = torch.randint(100, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch) -> None:
    """Looking for garbage takes a second with all that the tests have imported."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def worker(most: int, error: Exception) -> tuple[Callable[[int], str], list[int]]:
    """Work that takes at most so many at once, and the sizes that it was tried with."""
    tried: list[int] = []

    def work(size: int) -> str:
        tried.append(size)
        if size > most:
            raise error
        return "done"

    return work, tried


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
def test_the_size_is_halved_until_it_fits_and_stays(error: Exception, caplog) -> None:
    size = BatchSize(7)
    work, tried = worker(2, error)
    assert [size.run(work), size.run(work)] == ["done", "done"]
    assert tried == [7, 3, 1, 1]
    said = [record.getMessage() for record in caplog.records]
    assert said[-1] == "memory ran out: scoring.batch_size is 1 from here on"
    assert len(said) == 2
    with pytest.raises(RuntimeError) as raised:
        size.run(worker(0, error)[0])
    assert raised.value is error


def test_what_is_kept_goes_first_but_not_for_ever() -> None:
    """What is dropped is kept again by the next try: that went on without end."""
    kept: list[bool] = []

    def drop() -> bool:
        kept.append(True)
        return True

    work, tried = worker(2, CUDA)
    assert BatchSize(4).run(work, drop) == "done"
    assert tried == [4, 4, 2]
    assert len(kept) == 1


def test_another_fault_is_told_at_once() -> None:
    work, tried = worker(0, RuntimeError("a kernel refuses"))
    with pytest.raises(RuntimeError, match="a kernel refuses"):
        BatchSize(4).run(work)
    assert tried == [4]


def test_evaluators_that_share_a_size_score_as_before(caplog) -> None:
    model, size = tiny_model("llama"), BatchSize(4)
    shared = some_map(model)
    expected = Evaluator(model, WINDOWS, batch_size=4).score(shared)
    one, other = (Evaluator(model, WINDOWS, batch_size=size) for _ in range(2))
    assert len(one.full_scores.kls) == 6  # so it keeps states in batches of 4
    with room_for(model, 1) as tried:
        assert one.score(shared).kls == pytest.approx(expected.kls, rel=1e-4, abs=1e-6)
        assert one.advance(shared, lambda scores, left: None if left else True)[1]
        assert sorted(set(tried), reverse=True) == [4, 2, 1]
        tried.clear()
        assert other.score(shared).nlls == pytest.approx(expected.nlls, rel=1e-4)
        assert set(tried) == {1}


def test_held_out_text_goes_through_in_smaller_batches() -> None:
    model = tiny_model("llama")
    scorer = HeldOutScorer(model, WINDOWS, None, batch_size=4)
    expected = dict(scorer.score(some_map(model)).scores)
    with room_for(model, 2) as tried:
        assert scorer.score(some_map(model)).scores == pytest.approx(expected, rel=1e-5)
    assert tried == [4, 2, 2, 2]
    with room_for(model, 0), pytest.raises(torch.OutOfMemoryError):
        scorer.score(some_map(model))


def of_means(model: nn.Module) -> torch.Tensor:
    means = layer_means(model, WINDOWS, batch_size=4)
    return torch.stack([*means.keys, *means.values]).flatten()


def of_pairs(model: nn.Module) -> torch.Tensor:
    return torch.tensor(block_errors(model, WINDOWS, batch_size=4)).flatten()


def of_fits(model: nn.Module) -> torch.Tensor:
    fits = fit_actions(model, WINDOWS, {1: [Constant(), Affine()]}, batch_size=4)
    return torch.cat([t.flatten() for fit in fits.values() for t in fit.tensors.values()])


@pytest.mark.parametrize("measure", [of_means, of_pairs, of_fits])
def test_what_is_measured_before_plans_is_measured_in_smaller_batches(measure: Callable) -> None:
    """It ended the command."""
    model = tiny_model("llama")
    expected = measure(model)
    with room_for(model, 2) as tried:
        found = measure(model)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert tried[:2] == [4, 2]
    assert set(tried[2:]) <= {2, 1, 4}
    with room_for(model, 0), pytest.raises(torch.OutOfMemoryError):
        measure(model)
