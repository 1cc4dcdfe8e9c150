"""The table of plans in RESULTS.md: the best plan of finished sweeps at each budget of KV bytes.

    python tests/benchmarks/plan_front.py SWEEP [SWEEP …] --budgets 0.3125 0.25 --out FOLDER

SWEEP is the run folder of a ``kvsharer sweep search_space=layer_actions``. For every budget it
takes the plan of most KV in the fronts that keeps no more, and its perplexity on the sweep's
held-out windows divided by that of the full cache. With ``--long N`` it runs ``kvsharer evaluate``
on N windows of 2,048 held-out tokens as well. At 256 tokens much of what is read is still in full.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from kvsharer_exp.cli.main import main
from kvsharer_exp.reporting.plan_kinds import size_words
from kvsharer_exp.values.plan import KVPlan

PERPLEXITY = "perplexity/report"


def rows_of(sweeps: list[Path], budgets: list[float]) -> list[dict]:
    """For each budget the plan of the fronts that keeps most below it, with its ratio."""
    entries = []
    for sweep in sweeps:
        result = json.loads((sweep / "result.json").read_text(encoding="utf-8"))
        full = result["full"]["scores"][PERPLEXITY]
        for entry in result["front"]:
            scores = entry["scores"]
            entries.append(
                {
                    "plan": entry["plan"],
                    "kv_fraction": entry["kv_fraction"],
                    "kl": scores["kl"],
                    "ratio": scores[PERPLEXITY] / full,
                    "parameter_bytes_saved": entry["parameter_bytes_saved"],
                }
            )
    rows = []
    for budget in budgets:
        fitting = [e for e in entries if e["kv_fraction"] <= budget + 1e-9]
        if fitting:
            rows.append({"budget": budget, **min(fitting, key=lambda e: e["ratio"])})
    return rows


def long_ratio(plan: str, windows: int, words: list[str]) -> float:
    """The perplexity of ``plan`` on windows of 2,048 tokens, divided by the full cache's."""
    with tempfile.TemporaryDirectory() as folder:
        text = [f"heldout.num_windows={windows}", "heldout.window_tokens=2048"]
        tasks = ["scoring.report.tasks=[]", "scoring.num_windows=24", "scoring.batch_size=1"]
        run = ["evaluate", f"plan={plan}", *text, *tasks, *words, f"hydra.run.dir={folder}"]
        if main([*run, "--quiet"]):
            raise SystemExit(f"evaluate failed for {plan}")
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    return result["scores"][PERPLEXITY] / result["full"]["scores"][PERPLEXITY]


def table(rows: list[dict]) -> str:
    long = any("ratio_2048" in row for row in rows)
    head = ["budget", "KV kept", "what the layers do", "KL", "ppl ratio", "weights saved"]
    head[5:5] = ["ppl ratio, 2,048 tokens"] if long else []
    lines = [" | ".join(["", *head, ""]).strip(), "| --- " * len(head) + "|"]
    for row in rows:
        megabytes = row["parameter_bytes_saved"] / 1e6
        cells = [
            f"{row['budget']:.2%}",
            f"{row['kv_fraction']:.2%}",
            size_words(KVPlan.parse(row["plan"])),
            f"{row['kl']:.3g}",
            f"{row['ratio']:.3f}",
            *([f"{row.get('ratio_2048', math.nan):.3f}"] if long else []),
            f"{megabytes:.1f} MB" if megabytes else "0",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--budgets", nargs="+", type=float, required=True)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--words", nargs="*", default=[], help="overrides for kvsharer evaluate")
    parser.add_argument("--name", default="plans")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = rows_of(options.sweeps, options.budgets)
    for row in rows if options.long else ():
        row["ratio_2048"] = long_ratio(row["plan"], options.long, options.words)
        sys.stdout.write(f"{row['kv_fraction']:.4f} {row['ratio_2048']:.4f}\n")
        sys.stdout.flush()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / f"{options.name}.md").write_text(table(rows))


if __name__ == "__main__":
    run()
