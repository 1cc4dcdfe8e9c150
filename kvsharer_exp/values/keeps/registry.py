"""The keeps that an owner can have.

A new one is its value, the class of ``model/stores/`` that holds its tokens, and a line in `OURS`.
"""

from __future__ import annotations

from typing import Any

from kvsharer_exp.values.errors import InputError, did_you_mean
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.keeps.window import Window
from kvsharer_exp.values.text import clip

OURS: tuple[type[Keep], ...] = (Window, SnapKV, H2O)


def read_keep(text: str) -> Keep | None:
    """The keep that ``text`` means; None if it is no text of one.

    Raises:
        InputError: a part of it breaks a rule.
    """
    return next((keep for kind in OURS if (keep := kind.read(text)) is not None), None)


def keep_from_dict(data: dict[str, Any]) -> Keep:
    """What `Keep.to_dict` gave.

    Raises:
        InputError: there is no keep of this name, or it does not take these fields.
    """
    fields = dict(data)
    name = str(fields.pop("keep", ""))
    classes = {kind.name: kind for kind in OURS}
    if name not in classes:
        raise InputError(f"keep {clip(name, 30)!r} is unknown: {did_you_mean(name, list(classes))}")
    try:
        return classes[name](**fields)
    except TypeError as error:
        raise InputError(
            f"keep {name} does not take {clip(', '.join(fields), 60)}: give what its text gives"
        ) from error
