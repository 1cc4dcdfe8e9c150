"""The paper's own numbers (https://arxiv.org/abs/2410.18517), from ``paper_numbers.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("paper_numbers.yaml")
METHOD = "dissimilar_tested"
"""The arm that is the paper's method."""


@dataclass(frozen=True, slots=True)
class PaperNumber:
    """One published number.

    ``model``: its name in the paper, ``model_ids``: the last part of hub ids that are it (none: any
    model). ``compression``: targets / layers, 0 for the full cache. ``value``: in the unit of our
    own scores; ``about``: the paper rounds it in words. ``length``: prompt + new tokens.
    ``settings``: what must be so in a run that is laid beside it, ``method``: likewise, but only of
    runs that chose the map by themselves.
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
    """All of them, in the order of the file."""
    content = _content()
    return tuple(
        number
        for table in content["tables"]
        for number in _of_table(table, content["models"], content["method"])
    )


def citation() -> str:
    """Whose numbers they are, in one line."""
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
