"""Make the tables of a report: finished runs next to the paper, one table per quantity.

The command ``report`` calls `tables` once for all runs and models. `comparison_page` and
`comparison_files` write the tables out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvsharer_exp.reporting.beside_paper import Compared
from kvsharer_exp.reporting.front_table import task_notes
from kvsharer_exp.reporting.measured import Measured
from kvsharer_exp.reporting.paper_numbers import PaperNumber
from kvsharer_exp.reporting.plan_kinds import action_counts, kv_percent
from kvsharer_exp.search.paper.arms import GIVEN
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import (
    CALIBRATION_PERPLEXITY,
    HELD_OUT_KL,
    HELD_OUT_PERPLEXITY,
    KL,
    label,
)

TITLES = {
    HELD_OUT_PERPLEXITY: "Perplexity of held-out text",
    HELD_OUT_KL: "KL to the full cache on held-out text, nats",
    "tasks/mean": "Mean of the tasks, 0 to 100",
    "tasks/retained": "Mean of the tasks, % of the full cache's",
    "search/seconds": "Seconds of the greedy search",
    "search/candidates": "Maps the greedy search evaluated",
    "bench/memory_mb": "Peak memory after the prefill, MB",
    "bench/cache_mib": "KV cache, MiB",
    "bench/kv_mib": "KV cache by the shapes, MiB",
    "bench/prefill_seconds": "Prefill, seconds",
    "bench/tokens_per_second": "Decode, tokens per second",
    "bench/decode_speedup": "Decode, times the rate of the full cache",
    KL: "KL to the full cache on calibration text, nats",
    CALIBRATION_PERPLEXITY: "Perplexity of calibration text",
}
"""The names of quantities in words, in the order of the report.

Other quantities are scores of single tasks, which follow ``tasks/retained``.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """One quantity across all runs.

    ``rows``: the header, and then one row per value. ``runs``: for each row below the header, the
    ids and addresses of its MLflow runs. ``has_paper``: whether a row has a number of the paper.
    """

    quantity: str
    title: str
    rows: list[list[str]]
    runs: list[tuple[tuple[str, str], ...]]
    notes: list[str]
    has_paper: bool


def tables(compared: Sequence[Compared]) -> list[Table]:
    """Make one table per quantity: those of `TITLES` in their order, tasks between them by name."""
    found = dict.fromkeys(one.value.quantity for one in compared)
    order = list(TITLES)
    tasks = order.index("tasks/retained")

    def place(quantity: str) -> tuple[int, str]:
        return (order.index(quantity), "") if quantity in TITLES else (tasks, quantity)

    return [
        _table(quantity, [one for one in compared if one.value.quantity == quantity])
        for quantity in sorted(found, key=place)
    ]


def _table(quantity: str, shown: Sequence[Compared]) -> Table:
    has_paper = any(one.paper for one in shown)
    keeps = any(one.value.retained is not None for one in shown)
    kept = _kv_cells(shown)
    size = "layers" if any(one.value.plan for one in shown) else "shared"
    header = ["model", "map", size, *(["KV"] if kept else []), "this run"]
    header += ["retained"] if keeps else []
    header += ["paper", "difference"] if has_paper else []
    rows = [header]
    for place, one in enumerate(shown):
        value = one.value
        row = [value.model, value.map, _size(value), *kept[place : place + 1], _cell(value)]
        if keeps:
            row.append(_share(value))
        if has_paper:
            row += _paper_cells(one)
        rows.append(row)
    runs = [
        tuple((run_id, one.value.run.page(run_id)) for run_id in one.value.run_ids) for one in shown
    ]
    return Table(quantity, title_of(quantity), rows, runs, _notes(shown), has_paper)


def title_of(quantity: str) -> str:
    """The name of a quantity in words."""
    return TITLES.get(quantity) or label(quantity, ", ")


def number_text(value: float) -> str:
    """``value`` with four digits, or all before the point; rounding noise of a zero is a zero."""
    if abs(value) < 1e-6:
        return "0"
    if abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _size(value: Measured) -> str:
    if value.plan:
        return action_counts(KVPlan.parse(value.plan))
    found = "?" if value.num_shared is None else str(value.num_shared)
    short = value.requested not in (None, value.num_shared)
    return f"{found}/{value.num_layers}" + (f" ({value.requested} asked)" if short else "")


def _kv_cells(shown: Sequence[Compared]) -> list[str]:
    """What each row keeps of the KV; none if no row of a map or plan knows it, as in old files."""
    kept = [one.value.kv_fraction for one in shown]
    if all(fraction is None for fraction, one in zip(kept, shown, strict=True) if one.value.arm):
        return []
    return ["–" if fraction is None else kv_percent(fraction, fine=True) for fraction in kept]


def _cell(value: Measured) -> str:
    inside = ""
    if value.low is not None and value.high is not None:
        inside = f" ({number_text(value.low)}–{number_text(value.high)})"
    return f"{number_text(value.value)}{inside} {value.mark}".rstrip()


def _share(value: Measured) -> str:
    if value.retained is None:
        return ""
    if value.retained_low is None or value.retained_high is None:
        return f"{value.retained:.1%}"
    return f"{value.retained:.1%} ({value.retained_low:.1%}–{value.retained_high:.1%})"


def _paper_cells(one: Compared) -> list[str]:
    if one.paper is None or one.difference is None:
        return ["–", "–"]
    paper = one.paper.value
    about = "≈ " if one.paper.about else ""
    return [about + number_text(paper), f"{one.difference:+.3g} ({one.difference / paper:+.1%})"]


def _notes(shown: Sequence[Compared]) -> list[str]:
    """Say what a reader must know before comparing a value with the number of the paper."""
    notes: dict[str, None] = {}
    for one in shown:
        value = one.value
        if one.paper is not None:
            if one.paper.measured_on:
                here = _measured_on(value)
                notes[f"The paper's: {one.paper.measured_on}; {value.model} here: {here}."] = None
            if value.arm == GIVEN:
                notes["A map was given: the paper's number is for the map of its method."] = None
        elif one.unlike:
            notes[f"The paper has no number for {value.model} with {one.unlike}."] = None
    if any(one.value.mark for one in shown):
        notes["▲ better, ▼ worse than the first arm of its run, ≈ not told apart."] = None
    if _kv_cells(shown):
        notes["KV: the share of the full cache's bytes that is kept, at footprint.context."] = None
    return [*notes, *_notes_on_tasks(shown)]


def _notes_on_tasks(shown: Sequence[Compared]) -> list[str]:
    """The `task_notes` of each run; they begin with the model if there are several."""
    models = {one.value.model for one in shown}
    by_run: dict[str, list[Measured]] = {}
    for one in shown:
        by_run.setdefault(one.value.run.run_id, []).append(one.value)
    notes: dict[str, None] = {}
    for values in by_run.values():
        full: dict[str, float] = {}
        ends: dict[str, tuple[float, float]] = {}
        others = []
        for value in values:
            name, kept = value.quantity, value.retained
            if value.num_shared != 0:
                others.append(({name: value.value}, {} if kept is None else {name: kept}))
            elif not value.arm:
                full[name] = value.value
                if value.low is not None and value.high is not None:
                    ends[name] = (value.low, value.high)
        head = f"{values[0].model}: " if len(models) > 1 else ""
        notes |= {head + note: None for note in task_notes(others, full, ends)}
    return list(notes)


def _measured_on(value: Measured) -> str:
    if value.quantity == HELD_OUT_PERPLEXITY:
        held = value.run.config.get("heldout", {})
        words = "{num_windows} windows of {window_tokens} tokens of {path}"
        return words.format_map(held) if held else "text that is not recorded"
    return "the same tasks as lm-eval runs them"


def paper_table(numbers: Sequence[PaperNumber], quantities: Iterable[str]) -> list[list[str]]:
    """Header and rows: what the paper reports of these quantities, and at which place in it."""
    wanted = set(quantities)
    rows = [["quantity", "model", "arm", "ratio", "paper", "place in arXiv 2410.18517"]]
    for number in numbers:
        if number.quantity in wanted:
            arm = number.arm.replace("_", " ") if number.compression else "full cache"
            words = [arm, number.length, *_special(number)]
            rows.append(
                [
                    title_of(number.quantity),
                    number.model,
                    ", ".join(filter(None, words)),
                    f"{number.compression:.1%}",
                    ("≈ " if number.about else "") + number_text(number.value),
                    number.place,
                ]
            )
    return rows


def _special(number: PaperNumber) -> list[str]:
    """Say which calibration text or size the number is for, if its table of the paper varies it."""
    words = {"calibration.path": "{}", "calibration.num_windows": "{} sentences"}
    if not number.experiment.startswith("paper_calibration"):
        return []
    key = {"paper_calibration_set": "calibration.path"}.get(
        number.experiment, "calibration.num_windows"
    )
    return [words[key].format(number.method[key])]


def headline(compared: Sequence[Compared], num_runs: int) -> str:
    """Say in one sentence what the report holds."""
    beside = [one for one in compared if one.paper is not None]
    models = len({one.value.model for one in compared})
    runs = f"{num_runs} run{'s' if num_runs != 1 else ''}"
    said = f"{runs} of {models} model{'s' if models != 1 else ''}, {len(compared)} values"
    if not beside:
        return f"{said}; the paper has no number for any of them."
    return f"{said}, {len(beside)} of them beside the paper's number."


def to_values(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """The values as the ``result.json`` of the report writes them."""
    return [
        {
            "quantity": one.value.quantity,
            "model": one.value.model_id,
            "map": one.value.map,
            "num_shared": one.value.num_shared,
            **({"plan": one.value.plan} if one.value.plan else {}),
            "kv_fraction": one.value.kv_fraction,
            "value": one.value.value,
            "low": one.value.low,
            "high": one.value.high,
            "retained": one.value.retained,
            "retained_low": one.value.retained_low,
            "retained_high": one.value.retained_high,
            "paper": None if one.paper is None else one.paper.value,
            "difference": one.difference,
            "place": "" if one.paper is None else one.paper.place,
            "mlflow_run_ids": list(one.value.run_ids),
        }
        for one in compared
    ]
