"""Write what the parts of ``make gpu`` found as a section of RESULTS.md, headed by the card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsharer_exp.reporting.bench_table import mib
from kvsharer_exp.reporting.markup import to_markdown
from tests.benchmarks.gpu.parts import MACHINE, Part

Results = list[dict[str, Any]]

TESTS = ["tests of", "passed", "failed", "skipped"]
CELLS = [
    *("batch × (prompt + new)", "prompt + output: measured", "plan", "cache MiB", "predicted"),
    *("peak of prefill, MiB", "prefill s", "tokens/s", "decode", "predicted"),
]
CALLED = {"7b": "Llama-2-7B", "smollm2": "SmolLM2-135M", "tiny": "tiny"}


def page(folder: Path, parts: Sequence[Part]) -> str:
    """The section as Markdown, of those of ``parts`` that have a result in ``folder``."""
    kept = [(part, found) for part in parts if (found := part.result(folder)) is not None]
    done = [(part, found) for part, found in kept if "result" in found]
    here = json.loads((folder / MACHINE).read_text(encoding="utf-8"))
    commits = Counter(found["commit"] for _, found in done)
    texts = [f"## On a GPU: {here['card']}", _made_with(here, commits)]
    for title, kind, write in SECTIONS:
        mine = [(part, found) for part, found in done if part.kind == kind]
        if mine:
            texts += [f"### {title}", *write([found["result"] for _, found in mine])]
    lost = [f"- `{p.name}` {'; '.join(f['without_result'])}" for p, f in kept if "result" not in f]
    if lost:
        texts += ["### Parts without a result", "\n".join(lost)]
    missing = len(parts) - len(kept)
    if missing:
        texts.append(f"{missing} of {len(parts)} parts are not there yet.")
    return "\n\n".join(text.strip() for text in texts) + "\n"


def troubles(folder: Path, parts: Sequence[Part]) -> list[str]:
    """A line for each test that failed and each part that has no result."""
    lines = []
    for part in parts:
        found = part.result(folder) or {}
        lines += [f"{part.name}: no result, {said}" for said in found.get("without_result", [])]
        lines += [
            f"{part.name}: {test} failed" for test in found.get("result", {}).get("failed", {})
        ]
    return lines


def _made_with(here: dict[str, Any], commits: Counter[str]) -> str:
    said = ", ".join(f"`{commit}` ({number} parts)" for commit, number in commits.items())
    memory = f" with {here['memory_gib']} GiB" if here["memory_gib"] else ""
    return (
        f"`make gpu` ran on {here['card']}{memory}: torch {here['torch']}, CUDA {here['cuda']}, "
        f"transformers {here['transformers']}; commit {said}. Times and bytes are those of models "
        "with random weights of the named shape."
    )


def _tests(results: Results) -> list[str]:
    rows, failed, skipped = [TESTS], [], Counter[str]()
    for got in results:
        counts = (str(got["passed"]), str(len(got["failed"])), str(len(got["skipped"])))
        rows.append([f"`{got['file']}`", *counts])
        failed += [f"- `{name}`: {_line(said)}" for name, said in got["failed"].items()]
        skipped.update(got["skipped"].values())
    texts = [to_markdown(rows)]
    if failed:
        texts.append("Failed:\n\n" + "\n".join(failed))
    if skipped:
        texts.append("Skipped: " + "; ".join(f"{said} ({n})" for said, n in skipped.items()) + ".")
    return texts


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def _trials(results: Results) -> list[str]:
    texts = []
    for got in results:
        if "out_of_memory" in got:
            texts.append(f"{CALLED[got['shape']]} in {got['dtype']}: {got['out_of_memory']}")
            continue
        rows = [["plan", "block forwards", "seconds"]]
        rows += [[row["plan"], str(row["blocks"]), _seconds(row)] for row in got["trials"]]
        together = [["maps in one forward", "seconds a map"]]
        together += [[number, _seconds(one)] for number, one in got["maps_per_forward"].items()]
        texts += [
            f"{CALLED[got['shape']]} in {got['dtype']}: a trial of {got['windows']} × "
            f"{got['window_tokens']} tokens that changes each {got['every']}th layer from layer "
            f"{got['first_changed_layer']} on, as the median (lowest–highest). The full cache took "
            f"{got['full_seconds']:.2f} s at first.",
            to_markdown(rows),
            f"Eight maps on the {got['first_stage_windows']} windows of a first stage:",
            to_markdown(together),
        ]
    return texts


def _seconds(row: dict[str, float]) -> str:
    return f"{row['seconds']:.4f} ({row['min']:.4f}–{row['max']:.4f})"


def _cells(results: Results) -> list[str]:
    texts = []
    for shape in dict.fromkeys(cell["shape"] for cell in results):
        mine = [cell for cell in results if cell["shape"] == shape]
        rounds = mine[0]["repeats"]
        texts += [
            f"{CALLED[shape]} in {mine[0]['dtype']}, each value as full cache → plan. The cache is "
            "that after the last new token, and its predicted bytes stand beside it. "
            f"{f'Medians of {rounds} rounds. ' if rounds > 1 else 'One round each. '}"
            "Where not all tokens of an answer are decoded, the second column says which are.",
            to_markdown([CELLS, *map(_row, mine)]),
        ]
    return texts


def _row(cell: dict[str, Any]) -> list[str]:
    where = f"{cell['batch']} × ({cell['context']} + {cell['new_tokens']})"
    start = [where, cell["decoded"], cell["plan"]]
    if "out_of_memory" in cell:
        return [*start, "out of memory", *["–"] * 6]
    said = _both(*(mib(cell["predicted"]["kv_bytes"][side]) for side in ("full", "shared")))
    sides = [cell["full"], cell["shared"]]
    memory = [mib(s["peak_memory_bytes"]["median"]) for s in sides if "peak_memory_bytes" in s]
    return [
        *start,
        _both(*(mib(side["cache_bytes"]) for side in sides)),
        said,
        _both(*memory) if memory else "–",
        _both(*(f"{side['prefill_seconds']['median']:.3f}" for side in sides)),
        _both(*(f"{side['decode_tokens_per_second']['median']:.1f}" for side in sides)),
        f"×{cell['speedup']['decode']:.2f}",
        f"×{cell['predicted']['decode_speedup']:.2f}",
    ]


def _both(full: str, plan: str) -> str:
    return f"{full} → {plan}"


SECTIONS = (
    ("Tests", "tests", _tests),
    ("What a trial costs", "evaluator", _trials),
    ("Memory and speed", "bench", _cells),
)
