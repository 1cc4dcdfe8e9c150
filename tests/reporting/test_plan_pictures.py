"""Plans in pictures and on the page: a cell for what each layer does, and two fronts."""

from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from kvsharer_exp.reporting.figures.front import front_figure, front_html
from kvsharer_exp.reporting.figures.plans import Strip, look_of, plans_figure
from kvsharer_exp.reporting.figures.progress import progress_figure
from kvsharer_exp.reporting.figures.style import save_pdf, save_png
from kvsharer_exp.reporting.figures.tasks import tasks_figure
from kvsharer_exp.reporting.sweep_page import front_page, pictures
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.precision import BITS

from .plan_sweep import ENTRIES, FRONT, FULL, RESULTS, SWEEP
from .test_figures import traces

LABELS = {"reference_maps": {}, "score_label": "kl", "title": "t"}
OTHERS = [Read(0), ReadKV(0, 1), Drop(), Constant(), Affine()]


def test_owned_layers_get_lighter_with_fewer_bits_and_no_two_actions_look_alike() -> None:
    def grey(colour: str) -> int:
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    owned = [look_of(Own(bits)).fill for bits in sorted(BITS, reverse=True)]
    assert [grey(fill) for fill in owned] == sorted(map(grey, owned))
    fills = [*owned, *(look_of(action).fill for action in OTHERS)]
    assert len(set(fills)) == len(fills)
    assert [look_of(action).text for action in OTHERS] == ["0", "0\n1", "x", "c", "a"]
    assert [look_of(Own(bits)).text for bits in (16, 8, 4, 3, 2)] == ["16", "8", "4", "3", "2"]


def test_rows_are_plans_by_kv_and_cells_are_layers() -> None:
    strips = [
        Strip(KVPlan.parse("0_0_x_3q2"), 0.3, "KL 0.5"),
        Strip(KVPlan.parse("0_1_a_1"), 0.5, "KL 0.1"),
    ]
    figure = plans_figure(strips, "two plans")
    axes = figure.axes[0]
    cells = [to_hex(p.get_facecolor()).upper() for p in axes.patches if isinstance(p, Rectangle)]
    first = [look_of(action).fill for action in strips[1].plan.actions]
    second = [look_of(action).fill for action in strips[0].plan.actions]
    assert [cell[:7] for cell in cells] == [to_hex(fill).upper() for fill in [*first, *second]]
    written = [(t.get_text(), t.get_position()) for t in axes.texts]
    letters = [["16", "16", "a", "1"], ["16", "0", "x", "2"]]
    places = [(layer, row) for row in range(2) for layer in range(4)]
    assert written == [(letters[row][layer], (layer, row)) for layer, row in places]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["50.0% KV", "30.0% KV"]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "own, 16 bits",
        "own, 2 bits",
        "read (number: the source)",
        "a: affine",
        "x: drop",
    ]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the most KV on top


@pytest.mark.parametrize("layers", [1, 30, 126])
def test_any_depth_and_no_plans_give_a_picture(layers: int) -> None:
    plan = KVPlan((Own(),) + (Own(4),) * (layers - 1))
    for strips in ([], [Strip(plan, 0.5)]):
        figure = plans_figure(strips)
        assert save_png(figure).startswith(b"\x89PNG")
        assert save_pdf(figure).startswith(b"%PDF")
        assert figure.get_size_inches()[0] <= 18


def test_the_front_of_maps_only_is_drawn_beside_the_front_of_all_plans() -> None:
    axes = front_figure(RESULTS, FRONT, **LABELS).axes[0]
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert lines == {
        "front of all plans": [0.75, 0.5156, 0.3281, 0.25],
        "front of sharing maps only": [0.75, 0.5],
    }
    assert [text.get_text() for text in axes.texts] == ["1", "2"]  # layers shared, of maps only
    dots = {c.get_label(): len(c.get_offsets()) for c in axes.collections}
    assert dots == {"plans scored": 3, "maps scored": 3}
    made = traces(front_html(RESULTS, FRONT, **LABELS))
    assert made["front of sharing maps only"]["x"] == [0.75, 0.5]
    assert made["front of sharing maps only"]["line"]["dash"] == "dash"
    assert made["front of all plans"]["x"] == lines["front of all plans"]


def test_maps_alone_have_one_front_named_as_ever() -> None:
    maps = [r for r in RESULTS if r.sharing_map is not None]
    assert set(traces(front_html(maps, maps[:1], **LABELS))) == {"maps scored", "front"}


def test_plans_without_a_map_have_one_front_without_numbers() -> None:
    plans = [r for r in RESULTS if r.sharing_map is None]
    axes = front_figure(plans, plans, **LABELS).axes[0]
    assert [line.get_label() for line in axes.lines] == ["front of all plans"]
    assert not axes.texts
    assert "shared" not in axes.get_xlabel()


def test_the_legends_name_only_what_is_drawn() -> None:
    screened = replace(RESULTS[1], score=None, status="pruned")
    results = [*(r for r in RESULTS if r.sharing_map is None), screened]
    axes = front_figure(results, FRONT[1:2], **LABELS).axes[0]
    (legend,) = axes.figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["plans scored", "front of all plans"]
    drawn = [name for name, trace in traces(front_html(results, FRONT[1:2], **LABELS)).items()]
    assert drawn == named


def test_what_hovers_is_the_text_of_the_plan() -> None:
    made = traces(front_html(RESULTS, FRONT, **LABELS))
    text = made["front of all plans"]["text"][2]
    assert "0_1q4s4_0k1v_a" in text
    assert text.startswith("2 own at 10 bits, 1 read, 1 affine · 32.8% KV · sampler")


def test_progress_of_plans_is_the_best_within_a_budget() -> None:
    right = progress_figure(RESULTS, SWEEP.volumes, score_label="kl").axes[1]
    lines = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert lines["40%"] == [0.03, 0.03]
    assert lines["75%"] == [0.004, 0.003, 0.003]
    assert "10%" not in lines  # no plan is so small
    assert right.get_xlabel() == "plans scored"


def test_bars_of_plans_are_named_by_their_kv() -> None:
    axes = tasks_figure(ENTRIES, FULL, ["perplexity/report"]).axes[0]
    names = [made.get_label() for made in axes.containers]
    assert names == ["75.0% KV", "51.6% KV", "32.8% KV", "25.0% KV"]


@pytest.fixture(scope="module")
def page() -> str:
    return front_page(SWEEP, {name: save_png(f) for name, f in pictures(SWEEP).items()})


def test_plans_are_drawn_in_place_of_maps() -> None:
    assert set(pictures(SWEEP)) == {"front", "progress", "tasks", "plans"}
    maps = replace(SWEEP, entries=ENTRIES[:1])
    assert "maps" in pictures(maps) and "plans" not in pictures(maps)


def test_the_page_has_every_plan_to_copy_with_its_bytes(page: str) -> None:
    for made in ENTRIES:
        assert f"<code>plan={made.plan}</code>" in page
    assert "<h2>Plans</h2>" in page
    assert "one sequence of 2,048 tokens" in page
    assert "What each layer does, plan by plan" in page
    assert "<td>336</td><td>1.0</td>" in page  # 1024 bytes per token × 0.3281, and 1 MiB


def test_the_page_serves_the_plan_of_the_headline_with_its_fits(page: str) -> None:
    text = "0_1q4s4_0k1v_a"
    assert f"kvsharer evaluate model=tiny plan={text}" in page
    assert f"kvsharer export model=tiny plan={text} export.path=plan_model" in page
    assert "load_plan(&quot;FOLDER&quot;)" in page
    assert "with apply_plan(model, plan):" in page
    assert "vLLM does not run this plan on this model" in page


def test_a_plan_without_stand_ins_is_served_from_its_text() -> None:
    sweep = replace(SWEEP, entries=ENTRIES[:2])
    page = front_page(sweep, {name: save_png(f) for name, f in pictures(sweep).items()})
    assert "KVPlan.parse(&quot;0_1q8_2q8_3q4&quot;)" in page
    assert "from kvsharer_exp import KVPlan, apply_plan, load_model" in page
    assert "FOLDER" not in page


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0_1q4", ["transformers with this package"]),
        ("0_1_0k1v", ["transformers with this package"]),
        ("0_0_x_a_c", ["transformers", "vLLM"]),
    ],
)
def test_engines_of_plans(text: str, names: list[str]) -> None:
    from kvsharer_exp.reporting.serving import engines

    assert engines(KVPlan.parse(text), "LlamaForCausalLM") == names
