"""Finds the number of the paper that belongs to each value of a run.

The command ``report`` prints the two next to each other, and draws the curves that are made here.

A number belongs to a value if the quantity, the model, the arm, the number of shared layers, the
prompt length and the paper's settings agree. Where only settings differ, the report says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvsharer_exp.reporting.measured import Measured
from kvsharer_exp.reporting.paper_numbers import METHOD, PaperNumber
from kvsharer_exp.search.paper.arms import GIVEN


@dataclass(frozen=True, slots=True)
class Compared:
    """A measured value, and the paper's number for it if there is one.

    ``unlike``: if no number fits, the settings in which the run differs from the nearest number.
    """

    value: Measured
    paper: PaperNumber | None = None
    unlike: str = ""

    @property
    def difference(self) -> float | None:
        """The value of this run minus the paper's number."""
        return None if self.paper is None else self.value.value - self.paper.value


def compare_with_paper(
    values: Iterable[Measured], numbers: Sequence[PaperNumber]
) -> list[Compared]:
    """Match every value with the number that fits it.

    If several numbers fit, the one of the run's own experiment is taken.
    """
    return [_compared(value, numbers) for value in values]


def _compared(value: Measured, numbers: Sequence[PaperNumber]) -> Compared:
    near = [number for number in numbers if _same_thing(value, number)]
    unlike = [_unlike(value, number) for number in near]
    fitting = [number for number, why in zip(near, unlike, strict=True) if not why]
    if fitting:
        own = [number for number in fitting if number.experiment == value.experiment]
        return Compared(value, (own or fitting)[0])
    return Compared(value, unlike=min(unlike, key=len, default=""))


def _same_thing(value: Measured, number: PaperNumber) -> bool:
    model = value.model_id.rpartition("/")[2].lower()
    if number.model_ids and model not in map(str.lower, number.model_ids):
        return False
    if (value.quantity, value.length) != (number.quantity, number.length):
        return False
    layers = value.num_layers if not number.num_layers else number.num_layers
    if value.num_layers != layers or value.num_shared != int(number.compression * layers + 0.5):
        return False
    return not number.compression or value.arm == number.arm or _may_be(value, number)


def _may_be(value: Measured, number: PaperNumber) -> bool:
    """A map that was given may be one of the paper's method: only the user knows."""
    return value.arm == GIVEN and number.arm == METHOD


def _unlike(value: Measured, number: PaperNumber) -> str:
    """The settings in which the run differs from the paper, in words."""
    wanted = {**number.settings, **({} if value.arm == GIVEN else number.method)}
    differing = []
    for key, fits in wanted.items():
        held = value.settings.get(key)
        same = held == fits or (isinstance(fits, list) and held in fits)
        if key == "calibration.path":  # the paper's corpus, or a place named after it
            same = fits in str(held).lower()
        if not same:
            differing.append("other tasks" if key == "tasks" else f"{key}={held}, not {fits}")
    return "; ".join(differing)


def curves(compared: Sequence[Compared], quantity: str) -> Mapping[str, list[tuple[float, float]]]:
    """The curves of the runs: model and map → points (share of layers shared, retained).

    ``retained`` is the share of the full cache's ``quantity``. The full cache, (0, 1), comes first.
    """
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for value in (one.value for one in compared):
        share = value.value / 100 if value.quantity == "tasks/retained" else value.retained
        if value.quantity == quantity and share is not None and value.num_shared:
            place = (value.num_shared / value.num_layers, share)
            for label in _curves_of(value):
                lines.setdefault((label, value.run.run_id), []).append(place)
    labels = [label for label, _ in lines]
    return {
        label if labels.count(label) == 1 else f"{label} ({run_id[:8]})": sorted(
            {(0.0, 1.0), *points}
        )
        for (label, run_id), points in lines.items()
    }


def _curves_of(value: Measured) -> list[str]:
    """A map on a sweep's front is on the front's curve. The paper's are on their own curve too."""
    words = value.map.removeprefix("front, ")
    on_front = value.arm == "front" or words != value.map
    names = [*(["front"] if on_front else []), *([] if value.arm == "front" else [words])]
    return [f"{value.model}: {name}" for name in names]


def paper_curves(
    numbers: Sequence[PaperNumber], quantity: str
) -> Mapping[str, list[tuple[float, float]]]:
    """The same curves of the paper's method, model by model.

    What a perplexity retains is the perplexity of the full cache over that of the map.
    """
    chosen = [n for n in numbers if n.quantity == quantity and (n.arm == METHOD)]
    full = {n.model: n.value for n in chosen if not n.compression}
    lines: dict[str, list[tuple[float, float]]] = {}
    for n in chosen:
        if n.compression and quantity == "tasks/retained":
            lines.setdefault(n.model, [(0.0, 1.0)]).append((n.compression, n.value / 100))
        elif n.compression and n.model in full and n.experiment == "paper_ppl":
            lines.setdefault(n.model, [(0.0, 1.0)]).append((n.compression, full[n.model] / n.value))
    return lines
