"""The numbers that the paper published, read from ``paper_numbers.yaml``.

The command ``report`` prints them next to the values that our runs measured for the same model and
setting. `beside_paper` finds which belong together.

Paper: https://arxiv.org/abs/2410.18517.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("paper_numbers.yaml")
METHOD = "dissimilar_tested"
"""The name of the arm that is the paper's method."""


@dataclass(frozen=True, slots=True)
class PaperNumber:
    """One number that the paper published.

    ``model``: the model's name in the paper. ``model_ids``: the last parts of the hub ids that are
    this model; none means any model. ``compression``: targets / layers, 0 for the full cache.
    ``value``: in the unit of our own scores. ``about``: the paper gives the value rounded, in
    words. ``length``: prompt + new tokens. ``settings``: the settings that a run must have to be
    compared with the number. ``method``: likewise, but only for runs that chose the map themselves.
    """

    experiment: str
    place: str
    quantity: str
    model: str
    model_ids: tuple[str, ...]
    num_layers: int
    arm: str
    compression: float
    value: float
    about: bool
    length: str
    settings: Mapping[str, Any]
    method: Mapping[str, Any]
    measured_on: str


@cache
def paper_numbers() -> tuple[PaperNumber, ...]:
    """All published numbers, in the order of the file."""
    content = _content()
    return tuple(
        number
        for table in content["tables"]
        for number in _of_table(table, content["models"], content["method"])
    )


def citation() -> str:
    """The authors, title and arXiv number of the paper, in one line."""
    content = _content()
    return f"{content['authors']}, {content['title']}, arXiv {content['arxiv']}"


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return content


def _of_table(
    table: Mapping[str, Any], models: Mapping[str, Any], method: Mapping[str, Any]
) -> Iterator[PaperNumber]:
    arm, settings = table.get("arm", METHOD), table.get("settings", {})
    varied = {key: value for key, value in settings.items() if key in method}
    for model, length, by_ratio in _cells(table):
        for ratio, value in by_ratio.items():
            chosen = ratio and arm.startswith(METHOD)
            yield PaperNumber(
                experiment=table["experiment"],
                place=table["place"],
                quantity=table["quantity"],
                model=models[model]["name"],
                model_ids=tuple(models[model]["ids"]),
                num_layers=models[model]["layers"],
                arm=arm,
                compression=float(ratio),
                value=value * table.get("scale", 1),
                about=table.get("about", False),
                length=length,
                settings={key: v for key, v in settings.items() if key not in method},
                method={**method, **varied} if chosen else {},
                measured_on=table.get("measured_on", ""),
            )


def _cells(table: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[float, float]]]:
    for model, by_ratio in table.get("values", {}).items():
        yield model, "", by_ratio
    for length, by_ratio in table.get("lengths", {}).items():
        yield table["model"], length, by_ratio
