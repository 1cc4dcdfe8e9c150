"""What plans do on tasks that show what perplexity hides, each beside the full cache.

    python tests/benchmarks/tasks_by_plan.py retrieval --out docs/results/retrieval
    python tests/benchmarks/tasks_by_plan.py more_items --out docs/results/more_items
    python tests/benchmarks/tasks_by_plan.py collapse --out docs/results/collapse

One ``kvsharer evaluate`` a plan, whose words and plans `SETS` holds; ``--words`` changes or adds
some. Run again with the same ``--runs``, it evaluates only the plans that are not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvsharer_exp.reporting.front_table import number
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.reporting.plan_kinds import kv_percent
from kvsharer_exp.values.score_names import HELD_OUT_PERPLEXITY, ScoreName, label, table_columns
from tests.benchmarks.kept import keep_results

LAYERS = 30


def plan_of(most: str, others: Mapping[int, str]) -> str:
    """The plan of SmolLM2 whose layers keep their KV in the bits of ``most``, but for ``others``.

    These have other bits (``q3``) or another action.
    """
    texts = [others.get(layer, most) for layer in range(LAYERS)]
    return "_".join(f"{n}{text}" if text[0] == "q" else text for n, text in enumerate(texts))


FOUR, THREE = "q4g128s4", "q3g128s4"
BY_RECALL = plan_of(
    THREE,
    {
        **dict.fromkeys((1, 4, 5, 7, 8, 11, 14, 16, 17, 19, 20, 23), FOUR),
        **{3: "q3", 18: "q8g64s4"},
    },
)
RETRIEVAL = (
    *("scoring=long", "model.dtype=float32", "footprint.context=2048"),
    "scoring.report.tasks=[multi_key_2048,needle_2048]",
)


class Set(NamedTuple):
    """Plans by their names in the table, and the words that all are evaluated with."""

    words: Sequence[str]
    plans: Mapping[str, str]


SETS = {
    "retrieval": Set(
        (*RETRIEVAL, "scoring.report.limit=16"),
        {
            "the plan of 25 % above, layer 2 at 3 bits too": plan_of(
                FOUR, dict.fromkeys((2, 5, 6, 7, 8, 14, 15, *range(24, 30)), THREE)
            ),
            "the plan of 22 % above": plan_of(THREE, dict.fromkeys((1, 10, 11), FOUR)),
            "27 layers at 4 bits, 3 affine": plan_of(FOUR, dict.fromkeys((8, 17, 28), "a")),
            "chosen by recall": BY_RECALL,
        },
    ),
    "more_items": Set((*RETRIEVAL, "scoring.report.limit=48"), {"chosen by recall": BY_RECALL}),
    "collapse": Set(
        (
            *("model.dtype=float32", "scoring.report.tasks=[copying,sums,variables]"),
            *("scoring.report.limit=24", "heldout.num_windows=6"),
        ),
        {
            "five shared layers": "_".join(
                "0" if layer in (7, 8, 17, 20, 28) else str(layer) for layer in range(LAYERS)
            )
        },
    ),
}


def evaluate(run: Path, plan: str, words: Sequence[str]) -> dict[str, Any]:
    """The ``result.json`` of this ``kvsharer evaluate``; it is run where there is none."""
    if not (run / "result.json").exists():
        where = (f"hydra.run.dir={run}", f"tracking.folder={run.parent / 'mlruns'}", "-q")
        command = [sys.executable, "-m", "kvsharer_exp", "evaluate", f"plan={plan}", *where, *words]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((run / "result.json").read_text("utf-8"))
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The full cache and a row a plan: KV, ratio of perplexities, and tasks with intervals."""
    full = next(iter(found.values()))["full"]
    tasks = [name for name in table_columns(full["scores"]) if ScoreName.parse(name).is_task]
    rows = [["plan", "KV", "ppl ratio", *map(label, tasks)]]
    sides = {"full cache": (full, 1.0), **{n: (r, kept(r)) for n, r in found.items()}}
    for name, (held, share) in sides.items():
        ratio = held["scores"][HELD_OUT_PERPLEXITY] / full["scores"][HELD_OUT_PERPLEXITY]
        cells = [
            f"{number(held['scores'][task])} ({{:.2f}}–{{:.2f}})".format(*held["intervals"][task])
            for task in tasks
        ]
        rows.append([name, kv_percent(share, fine=True), f"{ratio:.3f}", *cells])
    return to_markdown(rows)


def kept(result: Mapping[str, Any]) -> float:
    fraction: float = result["footprint"]["kv_fraction"]
    return fraction


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--words", nargs="*", default=[], help="overrides for kvsharer evaluate")
    parser.add_argument("--runs", type=Path, help="where the runs are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.runs or Path(tempfile.mkdtemp(prefix="tasks-by-plan-"))
    wanted, found = SETS[options.set], {}
    for place, (name, plan) in enumerate(wanted.plans.items()):
        words = [*wanted.words, *options.words]
        found[name] = evaluate(folder / f"plan-{place}", plan, words)
        sys.stdout.write(table({name: found[name]}))
        sys.stdout.flush()
    keep_results(options.out, options.set, table(found), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
