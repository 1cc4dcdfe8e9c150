"""Records are frozen and survive JSON."""

import importlib
import pkgutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsharer_exp import values
from kvsharer_exp.values.agreement import Agreement
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint, MeasuredFootprint
from kvsharer_exp.values.greedy import GreedyResult, GreedyStep
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.record import Record
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.trial import FrontEntry, TrialResult
from tests.refusals import check_refusal
from tests.values.test_sharing_map import sharing_maps

numbers = st.floats(allow_nan=False, allow_infinity=False)
naturals = st.integers(0, 10**9)
scores = st.dictionaries(st.text(max_size=8), numbers, max_size=3)
pairs = st.builds(LayerPair, naturals, naturals, numbers)
steps = st.builds(GreedyStep, naturals, naturals, numbers, st.none() | numbers, st.booleans())
measured = st.builds(MeasuredFootprint, naturals, naturals)
footprints = st.builds(
    Footprint, naturals, numbers, naturals, st.none() | measured, naturals, naturals, naturals
)
sources = sharing_maps().map(lambda sharing_map: sharing_map.kv_source_layers)
several = st.lists(numbers, max_size=3).map(tuple)

maybe = st.none() | naturals

RECORDS = {
    Agreement: st.builds(Agreement, naturals, maybe, maybe, naturals, numbers),
    LayerPair: pairs,
    DissimilarityRanking: st.builds(
        DissimilarityRanking,
        st.text(max_size=5),
        st.text(max_size=5),
        naturals,
        st.lists(pairs, max_size=3).map(tuple),
    ),
    MeasuredFootprint: measured,
    Footprint: footprints,
    CandidateScores: st.builds(CandidateScores, several, several, several),
    GreedyStep: steps,
    GreedyResult: st.builds(
        GreedyResult,
        numbers,
        naturals,
        naturals,
        sources,
        naturals,
        numbers,
        st.lists(steps, max_size=3).map(tuple),
    ),
    TrialResult: st.builds(
        TrialResult,
        naturals,
        st.dictionaries(st.text(max_size=5), naturals | st.booleans() | st.text(max_size=3)),
        sharing_maps(),
        scores,
        footprints,
        st.sampled_from(["complete", "screened_out", "failed"]),
        st.text(max_size=5),
        numbers,
        st.none() | numbers,
        st.text(max_size=5),
        st.text(max_size=5),
    ),
    FrontEntry: st.builds(
        FrontEntry, sources, st.text(max_size=5), naturals, numbers, scores, scores
    ),
}


def test_every_record_is_covered() -> None:
    names = [module.name for module in pkgutil.iter_modules(values.__path__)]
    modules = [importlib.import_module(f"{values.__name__}.{name}") for name in names]
    defined = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Record) and value is not Record
    }
    assert defined == set(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
@given(data=st.data())
def test_json_round_trip(record: type, data: st.DataObject) -> None:
    value = data.draw(RECORDS[record])
    assert record.from_json(value.to_json()) == value


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_frozen_and_slotted(record: type) -> None:
    assert record.__dataclass_params__.frozen
    assert "__dict__" not in dir(record)


def test_scores_join_window_by_window() -> None:
    joined = CandidateScores((1.0,), (0.0,), (2.0,)) + CandidateScores((0.5,), (1.0,), (4.0,))
    assert joined.cosine == 0.75
    assert joined.kl == 0.5
    assert joined.perplexity == pytest.approx(2.718281828**3)


def test_a_number_that_is_none_is_refused_by_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        LayerPair(1, 0, float("nan")).to_json()


@pytest.mark.parametrize(
    "text",
    [
        *('{"target": 1, "source": 0}', '{"target": 1, "source": 0, "dissimilarity": "far"}'),
        *('{"target": 1.5, "source": 0, "dissimilarity": 1}', "[1, 0, 0.5]", "", "[" * 5000),
        *('{"target": true, "source": 0, "dissimilarity": 1}', "9" * 5000),
        *('{"target": 1, "source": 0, "dissimilarity": 1e999}', '{"target": 1'),
        '{"target": 1, "source": 0, "dissimilarity": 1, "weight": 2}',
        f'{{"target": 1, "source": 0, "dissimilarity": {"9" * 400}}}',
    ],
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(InputError) as error:
        LayerPair.from_json(text)
    check_refusal(f"kvsharer: {error.value}", "or make the file again")
