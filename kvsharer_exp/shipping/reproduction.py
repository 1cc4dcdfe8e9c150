"""Compare two ``result.json`` of the same configuration, value by value.

The command ``reproduce`` compares a recorded run with the same run made again.

Times, addresses and ids are no results and are left out. Sentences, and the intervals of what is
retained, are left out too, for they follow from the values. So is what is retained of a task that
the full cache fails, which earlier versions wrote. A sharing map is one value.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvsharer_exp.values.score_names import failed, is_share

Verdict = Literal["exact", "within tolerance", "differs", "missing", "new"]

_SURROUNDINGS = ("versions", "texts")
_AT_START = "trials_at_start"
_LEFT_OUT = {
    *("schema", "command", "mlflow_run_id", "mlflow_compare_url", "study", "threads", "directions"),
    *("pass_marks", "notes", "where_from", _AT_START, *_SURROUNDINGS),
    # A clock or the rest of the machine decides these; keys with "seconds" are left out as well.
    *("decode_tokens_per_second", "resident_bytes", "peak_memory_bytes", "speedup"),
    *("prefill_peak_bytes", "decode_peak_bytes", "tokens_per_second", "ratios", "preemptions"),
    "load_averages",
}


@dataclass(frozen=True, slots=True)
class Value:
    """One value as recorded and as made ``again``; None where one side lacks it.

    ``off`` is the relative difference of two unequal numbers that are not both integers.
    """

    path: str
    recorded: Any
    again: Any
    verdict: Verdict
    off: float | None = None

    @property
    def matches(self) -> bool:
        return self.verdict in ("exact", "within tolerance")

    @property
    def section(self) -> str:
        """The part of ``result.json`` that the value is in."""
        return self.path.partition("[")[0].partition(".")[0]


def compare_results(
    recorded: Mapping[str, Any], again: Mapping[str, Any], tolerance: float
) -> list[Value]:
    """Compare every value of either side, in the order of ``recorded``.

    ``tolerance`` is the largest relative difference of two numbers that match. Two integers match
    only if they are equal. An interval that was not recorded is left out, because earlier versions
    gave none to some scores.
    """
    full = again.get("full", {})
    failing = failed(full.get("scores", {}), again.get("pass_marks"))
    before, after = dict(_leaves(recorded, failing)), dict(_leaves(again, failing))
    paths = [*before, *(path for path in after if path not in before and not _is_interval(path))]
    return [_value(path, before, after, tolerance) for path in paths]


def _is_interval(path: str) -> bool:
    return "intervals." in path


def drew_other_maps(values: Sequence[Value]) -> bool:
    """Whether the two sides of a sweep hold other maps or plans, or another number of trials."""
    return any(
        value.section == "trials" or value.path.endswith((".kv_source_layers", ".plan"))
        for value in values
        if not value.matches
    )


def why_other_maps(recorded: Mapping[str, Any]) -> str:
    """Say whether a recorded sweep was continued, which may have made it draw other maps.

    Sweeps of earlier versions do not tell.
    """
    known = recorded.get(_AT_START)
    if isinstance(known, bool) or not isinstance(known, int):
        return "a sweep that was stopped and continued may have drawn other maps"
    if not known:
        return "the recorded sweep was not continued: it drew its maps in one go"
    return (
        f"the recorded sweep continued a study that held {known} maps, so it may have drawn other "
        "maps than in one go"
    )


def differing_surroundings(
    recorded: Mapping[str, Any], again: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """The versions, machine, commit and texts that are not the same, as (what, recorded, now)."""
    found = []
    for part in _SURROUNDINGS:
        before, after = recorded.get(part, {}), again.get(part, {})
        for name in {**before, **after}:
            pair = (str(before.get(name, "")), str(after.get(name, "")))
            if pair[0] != pair[1]:
                found.append((f"{part}.{name}", *pair))
    return found


def summary(values: Sequence[Value]) -> list[list[str]]:
    """Header and rows: how many values of each section match, and how far the farthest is off."""
    rows = [["values of", "exact", "within tolerance", "differ", "farthest off"]]
    for section in dict.fromkeys(value.section for value in values):
        held = [value for value in values if value.section == section]
        exact = sum(value.verdict == "exact" for value in held)
        near = sum(value.verdict == "within tolerance" for value in held)
        off = max((value.off for value in held if value.off is not None), default=0.0)
        differ = len(held) - exact - near
        rows.append([section, str(exact), str(near), str(differ), f"{off:.1e}" if off else "0"])
    return rows


def values_table(values: Sequence[Value]) -> list[list[str]]:
    """Header and rows of a table with one row per value."""
    rows = [["value", "recorded", "now", "verdict"]]
    for value in values:
        off = f" by {value.off:.1e}" if value.off else ""
        rows.append([value.path, _text(value.recorded), _text(value.again), value.verdict + off])
    return rows


def _text(value: Any) -> str:
    return "–" if value is None else repr(value) if isinstance(value, float) else str(value)


def _leaves(value: Any, failing: Container[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """The path and value of all that is compared; ``failing``: the scores that retain nothing."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "kv_source_layers" and item is not None:
                yield f"{path}.{key}".lstrip("."), "_".join(map(str, item))
            elif key in failing and path.rpartition(".")[2] == "retained":
                continue
            elif key not in _LEFT_OUT and "seconds" not in key and not is_share(key):
                yield from _leaves(item, failing, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, failing, f"{path}[{index}]")
    else:
        yield path, value


def _value(
    path: str, before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float
) -> Value:
    if path not in after:
        return Value(path, before[path], None, "missing")
    if path not in before:
        return Value(path, None, after[path], "new")
    old, new = before[path], after[path]
    if old == new:
        return Value(path, old, new, "exact")
    if not (_is_number(old) and _is_number(new)) or type(old) is type(new) is int:
        return Value(path, old, new, "differs")
    off = abs(new - old) / abs(old) if old else math.inf
    return Value(path, old, new, "within tolerance" if off <= tolerance else "differs", off)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
