"""Every number of the paper is there once, with its place, and is the one that was published."""

from collections import Counter

import pytest

from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.reporting.paper_numbers import METHOD, PaperNumber, citation, paper_numbers

NUMBERS = paper_numbers()
EXPERIMENTS = {path.stem for path in data_dir("conf").glob("experiment/*.yaml")}


def chosen(**wanted: object) -> list[PaperNumber]:
    return [n for n in NUMBERS if all(getattr(n, key) == value for key, value in wanted.items())]


def only(**wanted: object) -> float:
    (number,) = chosen(**wanted)
    return number.value


def test_every_table_is_whole() -> None:
    counted = Counter((n.experiment, n.quantity) for n in NUMBERS)
    assert counted == {
        ("paper_main", "tasks/mean"): 5 * 4,
        ("paper_main", "tasks/retained"): 5 * 3,
        ("paper_main", "lm_eval/xsum/rouge1"): 2,
        ("paper_ppl", "perplexity/report"): 2 * 4 * 2 + 3,
        ("paper_random", "perplexity/report"): 4,
        ("paper_calibration_set", "perplexity/report"): 2 * 2,
        ("paper_calibration_size", "perplexity/report"): 3,
        ("paper_search_time", "search/seconds"): 3,
        ("paper_memory_speed", "bench/memory_mb"): 4 * 4,
        ("paper_memory_speed", "bench/prefill_seconds"): 4 * 2,
        ("paper_memory_speed", "bench/tokens_per_second"): 4 * 4,
        ("paper_memory_speed", "bench/decode_speedup"): 4,
    }


def test_every_number_has_a_place_and_an_experiment_that_can_be_run() -> None:
    assert "2410.18517" in citation()
    assert {n.experiment for n in NUMBERS} <= EXPERIMENTS
    assert all(n.place and n.value > 0 for n in NUMBERS)


def test_no_two_are_of_the_same_thing() -> None:
    things = [
        (n.experiment, n.quantity, n.model, n.arm, n.compression, n.length, str(n.method))
        for n in NUMBERS
    ]
    assert len(things) == len(set(things))


@pytest.mark.parametrize("model", sorted({n.model for n in chosen(quantity="tasks/mean")}))
def test_percentages_are_those_of_the_scores(model: str) -> None:
    """Two columns of the same table, copied apart: each checks the other."""
    score = {n.compression: n.value for n in chosen(quantity="tasks/mean", model=model)}
    for number in chosen(quantity="tasks/retained", model=model):
        share = 100 * score[number.compression] / score[0]
        assert number.value == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("length", ["512+32", "256+2048", "512+2048", "1024+4096"])
def test_speed_ups_are_those_of_the_rates(length: str) -> None:
    rates = chosen(quantity="bench/tokens_per_second", length=length)
    rate = {(n.arm, n.compression): n.value for n in rates}
    said = only(quantity="bench/decode_speedup", length=length)
    assert said == pytest.approx(rate[METHOD, 0.25] / rate[METHOD, 0.0], abs=0.011)


def test_values_as_published() -> None:
    ppl = {"quantity": "perplexity/report", "experiment": "paper_ppl"}
    assert only(**ppl, model="Llama2-7B-Chat", compression=0.25) == 9.39
    assert only(**ppl, model="InternLM2-20B", compression=0.25) == 7.38
    assert only(**ppl, model="Llama2-70B", compression=0.125) == 5.59
    random = {"experiment": "paper_random", "arm": "random_untested"}
    assert [n.value for n in chosen(**random)] == [21.29, 51.41, 13.58, 18.50]
    sizes = chosen(experiment="paper_calibration_size")
    held = {n.method["calibration.num_windows"]: n.value for n in sizes}
    assert held == {10: 9.48, 30: 9.39, 50: 9.33}
    books = [n for n in NUMBERS if n.method.get("calibration.path") == "bookcorpus"]
    assert [n.value for n in books] == [9.15, 9.17]
    xsum = chosen(quantity="lm_eval/xsum/rouge1")
    assert [round(100 * n.value, 2) for n in xsum] == [25.84, 0.71]
    memory = {n.arm: n.value for n in chosen(quantity="bench/memory_mb", length="1024+4096")}
    assert memory == {
        METHOD: 37231,
        f"{METHOD} + H2O": 31591,
        f"{METHOD} + PyramidInfer": 31417,
    }
    assert all(n.about for n in chosen(experiment="paper_search_time"))


def test_the_full_cache_and_random_sharing_ask_for_no_setting_of_the_method() -> None:
    assert not any(n.method for n in NUMBERS if not n.compression or n.arm == "random_untested")
    assert all(n.method["search.threshold"] == 0.5 for n in chosen(arm=METHOD) if n.compression)
