"""Build docs/api.md from signatures and docstrings (``make docs``); a test says when it is old."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import kvsharer_exp
from kvsharer_exp import extend

PAGE = Path(__file__).with_name("api.md")
SECTIONS: dict[str, tuple[str, list[str]]] = {
    "Run, share, ship": ("kvsharer_exp", kvsharer_exp.__all__),
    "Extend": ("kvsharer_exp.extend", extend.__all__),
}
HEAD = """# API

The public Python interface, written from the docstrings by `make docs`. Import from these two
places only: where a name lives inside the package may change, its name here does not. Every
frozen value has `to_dict`, `from_dict`, `to_json` and `from_json`; a sharing map has `to_json`,
`from_json` and `parse`.
"""
MOVED = {
    "kvsharer_exp.search.spaces": ["SearchSpace", "Space", "SpaceSetting"],
    "kvsharer_exp.search.spaces.base": ["from_pairs", "or_first_pair", "refuse_a_single_map"],
    "kvsharer_exp.search.stages": ["Fitness"],
    "kvsharer_exp.search.map_sampler": ["MapSampler", "Strategy"],
    "kvsharer_exp.search.memory": ["Memory"],
    "kvsharer_exp.records": [
        *("CandidateScores", "DissimilarityRanking", "Footprint", "LayerPair", "TrialResult"),
    ],
    "kvsharer_exp.sharing_map": ["SharingMap"],
    "kvsharer_exp.errors": ["InputError", "at_least"],
    "kvsharer_exp.texts": ["Passage", "TextParts", "split_texts", "token_windows"],
    "kvsharer_exp.models": ["ModelSpec"],
    "kvsharer_exp.sharing.architectures": ["attention_layers"],
}
"""Where the names of `kvsharer_exp.extend` were imported from before it existed."""


def page() -> str:
    """All of docs/api.md."""
    parts = [HEAD]
    for title, (module, names) in SECTIONS.items():
        parts.append(f"## {title}\n\n`from {module} import …`\n")
        for name in names:
            parts += entry(name, getattr(import_module(module), name))
    parts += moved()
    return "\n".join(parts)


def moved() -> Iterator[str]:
    """The imports of earlier versions beside those of today."""
    yield "## Moved\n"
    yield "Earlier versions documented imports from single modules. They are gone; use:\n"
    yield "| until now | from now on |\n| --- | --- |"
    for module, names in MOVED.items():
        listed = ", ".join(names)
        new = f"from kvsharer_exp.extend import {listed}"
        yield f"| `from {module} import {listed}` | `{new}` |"
    yield ""


def entry(name: str, thing: Any) -> Iterator[str]:
    """Heading, signature and docstring; of a class its public members too."""
    yield f"### {name}\n"
    is_error = isinstance(thing, type) and issubclass(thing, Exception)  # has no signature
    if not is_error and not getattr(thing, "_is_protocol", False):
        yield f"```python\n{name}{_signature(thing)}\n```\n"
    yield markdown(_docstring(thing))
    if inspect.isclass(thing):
        yield from _members(thing)


def _members(thing: type) -> Iterator[str]:
    fields = getattr(thing, "__dataclass_fields__", {})
    for name, value in vars(thing).items():
        is_property = isinstance(value, (property, cached_property))
        value = getattr(value, "__func__", value)  # of a class method
        if name.startswith("_") or name in fields or not (is_property or callable(value)):
            continue
        signature = "" if is_property else _signature(value)
        brief = re.sub(r"\n(?=.)", "\n  ", markdown(_docstring(value)).rstrip())
        yield f"- **`{name}{signature}`** {brief}".rstrip() + "\n"


def _signature(thing: Any) -> str:
    """As written in the source; a parameter a line where it is long."""
    signature = inspect.signature(thing)
    parts, star = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = parameter.default
        if default is parameter.empty:
            shown = ""
        elif callable(default) or repr(default).startswith("<"):  # a lambda, a factory
            shown = " = …"
        else:
            shown = f" = {default!r}"
        parts.append(f"{stars}{parameter.name}: {parameter.annotation}{shown}")
    result = "" if inspect.isclass(thing) else f" -> {signature.return_annotation}"
    text = f"({', '.join(parts)}){result}"
    return text if len(text) < 80 else "(\n    " + ",\n    ".join(parts) + f",\n){result}"


def _docstring(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def markdown(text: str) -> str:
    """A docstring of ours as Markdown: double backticks, and sections as lists."""
    text = text.replace("``", "`")
    text = re.sub(r"^(Args|Returns|Raises):$", r"\n**\1**\n", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    text = re.sub(r"^ {4,}(?=\S)", "  ", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
