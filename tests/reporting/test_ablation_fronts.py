"""Fronts of arms by setting, the area of each, and what the joint front adds."""

import pytest

from kvsharer_exp.reporting.ablation import Cell
from kvsharer_exp.reporting.ablation_fronts import areas, areas_table, fronts, joint_sentences
from kvsharer_exp.reporting.figures.ablation import fronts_figure
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.values.intervals import Interval
from kvsharer_exp.values.score_names import HELD_OUT_KL


def cell(arm: str, kept: float, kl: float | None, context: int = 512) -> Cell:
    scores = {} if kl is None else {HELD_OUT_KL: Interval(kl, kl, kl)}
    variant = {"footprint.context": context}
    return Cell(variant, arm, 1 - kept, 2, (2,), 0.0, 0.0, scores, {}, kv_fraction=kept)


CELLS = [
    cell("read", 0.5, 1.0),
    cell("read", 0.25, None),  # found nothing
    cell("quantised", 0.5, 0.2),
    cell("quantised", 0.25, 0.4),
    cell("joint", 0.5, 0.1),
    cell("joint", 0.3, 1.0),
    cell("dissimilar_tested", 0.5, 0.0),  # no arm of plans
    cell("read", 0.5, 3.0, 4096),
    cell("joint", 0.5, 0.0, 4096),
]


def test_areas_are_of_the_rectangle_up_to_a_kl_of_two() -> None:
    found = areas(fronts(CELLS))
    assert list(found) == ["512 tokens", "4096 tokens"]
    assert found["512 tokens"]["read"] == pytest.approx(0.5 * 0.5)
    assert found["512 tokens"]["quantised"] == pytest.approx(0.25 * 0.8 + 0.5 * 0.9)
    # The joint front has the quantised plan of a quarter as well: its own of 30 % is beaten.
    assert found["512 tokens"]["joint"] == pytest.approx(0.25 * 0.8 + 0.5 * 0.95)
    assert found["4096 tokens"] == {"read": 0, "joint": 0.5}


def test_tables_and_sentences() -> None:
    found = areas(fronts(CELLS))
    header, *rows = areas_table(found)
    assert header == ["arm", "area 512 tokens", "area 4096 tokens"]
    assert rows == [
        ["read", "0.2500", "0.0000"],
        ["quantised", "0.6500", "–"],
        ["joint", "0.6750", "0.5000"],
    ]
    assert joint_sentences(found) == [
        "at 512 tokens: the joint front covers 0.6750, 0.0250 more than that of quantised, the "
        "best single arm",
        "at 4096 tokens: the joint front covers 0.5000, 0.5000 more than that of read, the best "
        "single arm",
    ]
    assert joint_sentences({"": {"joint": 0.5}}) == []


def test_one_arm_of_plans_has_nothing_to_be_compared_with() -> None:
    cells = [cell("read", 0.5, 1.0), cell("dissimilar_tested", 0.5, 0.0)]
    assert areas(fronts(cells)) == {}


def test_a_panel_for_each_setting() -> None:
    figure = fronts_figure(fronts(CELLS), title="tiny")
    assert [axes.get_title() for axes in figure.axes] == ["512 tokens", "4096 tokens"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["quantised"].get_xdata()) == [0.25, 0.5]
    assert save_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("kept", [(0.5, 0.733), (0.26, 0.3), (0.03, 0.9)])
def test_the_axis_of_bytes_has_numbers(kept: tuple[float, float]) -> None:
    cells = [cell(arm, share, 0.1) for arm in ("read", "quantised") for share in kept]
    figure = fronts_figure(fronts(cells), title="tiny")
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    ticks = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
    assert len(ticks) >= 3
