"""Read the plan that a file or a folder holds, or one of the several plans of a front.

`KVPlan.parse` reads ``.json`` paths here, and `read_plan` folders. Both get the JSON of one plan,
which `KVPlan.from_json` reads. Files that hold several plans are ``front.json`` and the
``result.json`` of a sweep or a search.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_json, read_text, why_unreadable

PLAN, FITS = "plan.json", "fits.safetensors"
"""The files of a folder that keep its plan, and the numbers of the plan's stand-ins."""

FRONT, FRONT_FITS = "front.json", "fits"
"""The front of a sweep, and the folder beside it with the numbers of its plans' stand-ins."""

EXPORT_FITS = "fits.json"
"""The file of an export that names these numbers among its weights."""

_KEYS = ("actions", "plan", "kv_plan", "kv_source_layers")
_LIKE = '{"plan": "0_1q4_0_3"}'
_IN_FOLDERS = (PLAN, "config.json", "result.json")  # an export's, then a run's


class PlanFileError(InputError):
    """A file holds no such plan; the message names the file, the rule and the way out."""


def json_of_text(text: str) -> str | None:
    """The JSON of the plan that ``text`` names: ``FILE.json`` or ``FILE.json:CHOICE``.

    None if ``text`` has no such form.

    Raises:
        PlanFileError: see `json_of_file`.
    """
    found = file_and_choice(text)
    return None if found is None else json_of_file(*found)


def file_and_choice(text: str) -> tuple[Path, str | None] | None:
    """The file that ``FILE.json`` or ``FILE.json:CHOICE`` names, and the choice."""
    found = re.fullmatch(r"(.+\.json)(?::([0-9.]+))?", text.strip())
    return None if found is None else (Path(found[1]), found[2])


def json_of_file(path: Path, choice: str | None = None, *, called: str | None = None) -> str:
    """The JSON of the one plan of a file, or of the one that ``choice`` names.

    A choice with a decimal point, like ``0.25``, names the best plan of those that keep at most
    this fraction of the KV. One without, like ``4``, names the map with this many shared layers.
    ``called`` is what the user knows the file by, for messages; None: its name.

    Raises:
        PlanFileError: the file cannot be read, or holds no plan of this choice.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanFileError(
            f"plan file {shorten(path)} cannot be read ({why_unreadable(error)}): "
            f"give a JSON file like {_LIKE}"
        ) from error
    try:
        value = read_json(text)
    except json.JSONDecodeError as error:
        raise PlanFileError(
            f"plan file {shorten(path)} is not JSON (line {error.lineno}): give one like {_LIKE}"
        ) from error
    entries = _several(value)
    if choice is None and entries is None:
        return text
    name = called or shorten(path.name, 24)
    if entries is None:
        entry = value if isinstance(value, Mapping) else {"kv_source_layers": value}
        if _is_map(entry) and choice == str(_shared(entry["kv_source_layers"])):
            return _json(entry)
        raise PlanFileError(f"{name} has one plan: leave out :{clip(str(choice), 20)}")
    if choice is None and len(entries) == 1:
        return _json(entries[0])
    if choice is not None and "." in choice:
        return _json(_best(entries, choice, name))
    sizes = {_shared(e["kv_source_layers"]): e for e in reversed(entries) if _is_map(e)}
    if not sizes:
        raise PlanFileError(
            f"{name} has several plans, and no map: name one like {name}:0.25, the best "
            "that keeps at most a quarter of the KV"
        )
    if choice is None or int(choice) not in sizes:
        listed = ", ".join(map(str, sorted(sizes)))
        raise PlanFileError(
            f"{name} has maps of {clip(listed, 24)} shared layers: give one of these "
            "numbers behind it, like :4, or like :0.5 what keeps at most half of the KV"
        )
    return _json(sizes[int(choice)])


def json_of_folder(folder: Path) -> str:
    """The JSON of the plan of an export or of a run.

    Raises:
        PlanFileError: the folder has no file with a plan.
    """
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            text = json_of_file(folder / name, called=shorten(folder / name, 40))
            if name == PLAN or _is_plan(read_json(text)):
                return text
    raise PlanFileError(
        f"folder {shorten(folder)} has no plan: give an export, or the folder of a run that has "
        f"{PLAN} or result.json"
    )


def holds_plans(path: Path) -> bool:
    """Whether a JSON file that a command wrote holds a plan or several."""
    value = read_json(read_text(path))
    return _is_plan(value) or _several(value) is not None


def _several(value: Any) -> list[Mapping[str, Any]] | None:
    """The entries of a front, or of results at several ratios; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("front") or value.get("results")
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        return None
    return [entry for entry in value if _has_plan(entry)] or None


def _best(entries: Sequence[Mapping[str, Any]], choice: str, name: str) -> Mapping[str, Any]:
    try:
        most = float(choice)
    except ValueError as error:
        raise PlanFileError(
            f"{name}:{clip(choice, 20)} is no number: give a fraction like 0.25"
        ) from error
    sized = [(kept, e) for e in entries if (kept := _number(e.get("kv_fraction"))) is not None]
    fitting = [(kept, entry) for kept, entry in sized if kept <= most]
    if not fitting:
        least = min((kept for kept, _ in sized), default=math.nan)
        raise PlanFileError(
            f"no plan of {name} keeps at most {clip(choice, 20)} of the KV: "
            f"give {least:.4g} or more"
            if sized
            else f"{name} does not say how much KV its plans keep: name one by shared layers, :4"
        )
    return max(fitting, key=lambda held: (_goodness(held[1]), held[0]))[1]


def _goodness(entry: Mapping[str, Any]) -> float:
    """The score of an entry, or minus its KL; the least there is if it has neither."""
    score, scores = _number(entry.get("score")), entry.get("scores")
    if score is not None:
        return score
    kl = _number(scores.get("kl")) if isinstance(scores, Mapping) else None
    return -math.inf if kl is None else -kl


def _number(value: Any) -> float | None:
    """``value`` as a number; None if it is none, or NaN, or infinite, or too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _has_plan(entry: Mapping[str, Any]) -> bool:
    return any(entry.get(key) is not None for key in _KEYS)


def _is_map(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("kv_source_layers"), list)


def _shared(sources: Sequence[Any]) -> int:
    return sum(layer != source for layer, source in enumerate(sources))


def _is_plan(value: Any) -> bool:
    return isinstance(value, Mapping) and _has_plan(value)


def _json(entry: Mapping[str, Any]) -> str:
    return json.dumps({key: entry[key] for key in _KEYS if entry.get(key) is not None})
