"""Damage a file or a JSON value as disks, editors and people do, and say what its reader may do.

A reader of damaged input returns a value, or refuses it with an `InputError` in one clear line.
What it refuses it leaves as it was.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kvsharer_exp.cli.terminal import one_line
from kvsharer_exp.values.errors import InputError
from tests.refusals import check_refusal

ODD = st.sampled_from(
    [
        *("null", "true", "false", "0", "-1", "1.5", "1e999", "NaN", "-Infinity", "9" * 400),
        *("9" * 5000, '""', '"\\ud800"', '"\\u0000"', '"٣"', '"x.json"', '"0_1q4"', '"a://b"'),
        *("[]", "{}", "[[1]]", '["a"]', '{"a": 1}', '{"kl": null}', f'"{"x" * 500}"'),
        *("[" * 150 + "]" * 150, "[" * 900 + "]" * 900, "[" * 5000 + "]" * 5000),
    ]
)
"""JSON texts of values that are not expected."""


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> str:
    """The text of ``value``, in which one value or key, at any depth, is another, gone or twice."""
    if isinstance(value, str) and value[:1] in ("{", "["):  # JSON inside JSON
        return json.dumps(draw(damaged_json(json.loads(value))))
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 7)) == 0:
        return draw(ODD)
    is_object = isinstance(value, dict)
    items = list(value.items()) if is_object else [("", inner) for inner in value]
    place = draw(st.integers(0, len(items) - 1))
    change = draw(st.sampled_from(["deeper"] * 5 + ["gone", "twice", "renamed"]))
    parts = []
    for number, (key, inner) in enumerate(items):
        texts = [json.dumps(inner)]
        if number == place and change != "renamed":
            other = [] if change == "gone" else [draw(damaged_json(inner))]
            texts = texts + other if change == "twice" else other
        name = json.dumps(f"{key}é" if number == place and change == "renamed" else key)
        parts += [f"{name}: {text}" if is_object else text for text in texts]
    return f"{{{', '.join(parts)}}}" if is_object else f"[{', '.join(parts)}]"


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` after up to three cuts, flips, insertions, deletions or repetitions."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(1, 60)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "delete", "repeat", "zeros"]))
        middle = {
            "cut": b"",
            "flip": bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in content[begin:end][:2]),
            "insert": draw(st.binary(max_size=8)) + content[begin:end],
            "delete": b"",
            "repeat": content[begin:end] * 2,
            "zeros": bytes(end - begin),
        }[kind]
        rest = b"" if kind == "cut" else content[begin + 2 if kind == "flip" else end :]
        content = content[:begin] + middle + rest
    return content


@st.composite
def damaged_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of one JSON value a line after damage to its bytes, or to one of its values."""
    if draw(st.booleans()):
        return draw(damaged_bytes(content))
    lines = content.decode().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = draw(damaged_json(json.loads(lines[place])))
    return "".join(f"{line}\n" for line in lines).encode()


def damaged_file(value: Any) -> st.SearchStrategy[bytes]:
    """The JSON of ``value`` after damage to its bytes, or to one of its values."""
    in_json = damaged_json(value).map(str.encode)
    return in_json | damaged_bytes(json.dumps(value).encode())


def files(folder: Path) -> Mapping[str, bytes]:
    """The content of every file below ``folder``."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@contextmanager
def read_or_refused(folder: Path, *ours: str) -> Iterator[None]:
    """Whatever the block reads is read, or refused in one line with ``folder`` left as it was.

    ``ours``: the files of the folder that a reader writes in any case.
    """
    before = files(folder)
    try:
        yield
    except InputError as error:
        check_refusal(one_line(f"kvsharer: {error}"), "")  # as `main` prints it
        after = files(folder)
        for name in {*before, *after} - {*ours}:
            assert after.get(name) == before.get(name), name


def sizes(few: int, many: int = 10_000) -> Any:
    """Parametrise a test with the number of examples: ``few``, and ``many`` where it may be slow.

    The examples are the same in every run.
    """
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    common = {"derandomize": True, "deadline": 60_000, "suppress_health_check": checks}
    slow = (pytest.mark.slow, pytest.mark.timeout(3600))
    counts = [
        pytest.param(settings(max_examples=few, **common), id="few"),
        pytest.param(settings(max_examples=many, **common), id="many", marks=slow),
    ]
    return pytest.mark.parametrize("size", counts)
