"""The parts of ``make gpu``: one short piece of work each, and the file that holds its result.

The driver and the page read names and files only, so this module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
MACHINE = "machine.json"  # in the folder: the card and the software
UNDER_WAY = "under_way"  # in the folder: the name of the part that runs

# Cells of the 7B shape, as (prompt, new tokens, which tokens of the paper's those are). The paper's
# lengths are 512 + 32, 256 + 2048, 512 + 2048 and 1024 + 4096 (arXiv 2410.18517, table of memory
# and speed). A long answer is measured at its two ends, at the last of which the cache is as long
# as the paper's.
CELLS = (
    (512, 32, "512+32: all"),
    (256, 128, "256+2048: first 128"),
    (2176, 128, "256+2048: last 128"),
    (512, 128, "512+2048: first 128"),
    (2432, 128, "512+2048: last 128"),
    (1024, 128, "1024+4096: first 128"),
    (4992, 128, "1024+4096: last 128"),
)
BATCH_SIZES = (1, 8)  # the paper does not say which it used
PLANS = ("shared", "q4")


@dataclass(frozen=True, slots=True)
class Part:
    """``kind`` names the function of `work` that does it, with ``arguments``."""

    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def path(self, folder: Path) -> Path:
        return folder / "parts" / f"{self.name}.json"

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What is kept of it in ``folder``; None as long as it is not done."""
        path = self.path(folder)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def all_parts(tiny: bool = False) -> list[Part]:
    """In the order in which they run; with ``tiny`` those of a rehearsal on the CPU."""
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    tests = [
        Part(
            f"tests-{path.stem.removeprefix('test_')}",
            "tests",
            {"file": path.relative_to(ROOT).as_posix()},
        )
        for path in files
    ]
    if tiny:
        return [
            *tests,
            _evaluator("tiny", "float32", windows=4, tokens=16, repeats=1),
            *_cells("tiny", "float32", [(12, 3, "all")], (1,), repeats=1),
        ]
    dtypes = ("bfloat16", "float16", "float32")
    lengths = [(256, 64, "all"), (1024, 64, "all"), (8000, 64, "all")]
    return [
        *tests,
        *[_evaluator("smollm2", dtype, windows=24, tokens=256, repeats=5) for dtype in dtypes],
        *_cells("smollm2", "bfloat16", lengths, BATCH_SIZES, repeats=3),
        _evaluator("7b", "float16", windows=8, tokens=256, repeats=3),
        *_cells("7b", "float16", CELLS, BATCH_SIZES, repeats=1),
    ]


def _evaluator(shape: str, dtype: str, **numbers: int) -> Part:
    arguments = {"shape": shape, "dtype": dtype, **numbers}
    return Part(f"evaluator-{shape}-{dtype}", "evaluator", arguments)


def _cells(
    shape: str,
    dtype: str,
    lengths: Sequence[tuple[int, int, str]],
    batch_sizes: Sequence[int],
    repeats: int,
) -> list[Part]:
    cells = []
    for batch, (context, new, said), plan in product(batch_sizes, lengths, PLANS):
        arguments = {
            **{"shape": shape, "dtype": dtype, "plan": plan, "batch": batch, "context": context},
            **{"new_tokens": new, "decoded": said, "repeats": repeats},
        }
        cells.append(Part(f"bench-{shape}-{batch}x{context}+{new}-{plan}", "bench", arguments))
    return cells
