"""The table of plans in RESULTS.md: the best plan of finished sweeps at each budget of KV bytes.

    python tests/benchmarks/plan_front.py SWEEP [SWEEP …] --budgets 0.3125 0.25 --out FOLDER

SWEEP is the run folder of a ``kvsharer sweep`` of plans. Of the plans in the fronts that keep no
more than a budget, it takes that of least KL on the scoring windows, and says its perplexity on the
sweep's held-out windows, which have chosen nothing, divided by that of the full cache. With
``--long N`` it runs ``kvsharer evaluate`` on N windows of 2,048 held-out tokens as well. At 256
tokens much of what is read is still in full. With ``--each`` every SWEEP is one seed, and a row
says how far the seeds lie apart.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from kvsharer_exp.cli.main import main
from kvsharer_exp.reporting.plan_kinds import size_words
from kvsharer_exp.values.plan import KVPlan
from tests.benchmarks.kept import keep_results

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
                    "seed": result["seed"],  # its text has made the fits
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
            rows.append({"budget": budget, **min(fitting, key=lambda e: e["kl"])})
    return rows


def long_ratio(plan: str, seed: int, windows: int, words: list[str]) -> float:
    """The perplexity of ``plan`` on windows of 2,048 tokens, divided by the full cache's."""
    with tempfile.TemporaryDirectory() as folder:
        text = [f"heldout.num_windows={windows}", "heldout.window_tokens=2048"]
        tasks = ["scoring.report.tasks=[]", "scoring.num_windows=24", "scoring.batch_size=1"]
        run = [
            "evaluate",
            f"plan={plan}",
            f"seed={seed}",
            *text,
            *tasks,
            *words,
            f"hydra.run.dir={folder}",
        ]
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


def spread(values: list[float]) -> str:
    """Mean ± standard deviation of one value a seed, and the largest of them."""
    values = [value for value in values if not math.isnan(value)]
    if len(values) < 2:
        return "–"
    middle, apart = statistics.fmean(values), statistics.stdev(values)
    return f"{middle:.3f} ± {apart:.3f}, {max(values):.3f}"


def table_of_seeds(seeds: list[list[dict]]) -> str:
    """A row for each budget: what the best plans of all seeds keep, and their ratios."""
    long = any("ratio_2048" in row for rows in seeds for row in rows)
    head = ["budget", "seeds", "KV kept", "ppl ratio: mean ± sd, worst"]
    head += ["the same, 2,048 tokens"] if long else []
    lines = [" | ".join(["", *head, ""]).strip(), "| --- " * len(head) + "|"]
    budgets = dict.fromkeys(row["budget"] for rows in seeds for row in rows)
    for budget in budgets:
        of_seeds = [row for rows in seeds for row in rows if row["budget"] == budget]
        kept = [row["kv_fraction"] for row in of_seeds]
        cells = [
            f"{budget:.2%}",
            str(len(of_seeds)),
            f"{min(kept):.2%}–{max(kept):.2%}",
            spread([row["ratio"] for row in of_seeds]),
            *([spread([row.get("ratio_2048", math.nan) for row in of_seeds])] if long else []),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--budgets", nargs="+", type=float, required=True)
    parser.add_argument("--each", action="store_true", help="every SWEEP is one seed")
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--words", nargs="*", default=[], help="overrides for kvsharer evaluate")
    parser.add_argument("--name", default="plans")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    groups = [[sweep] for sweep in options.sweeps] if options.each else [options.sweeps]
    seeds = [rows_of(sweeps, options.budgets) for sweeps in groups]
    long: dict[tuple[str, int], float] = {}  # budgets share plans
    for row in [row for rows in seeds for row in rows if options.long]:
        key = row["plan"], row["seed"]
        if key not in long:
            long[key] = long_ratio(*key, options.long, options.words)
            print(f"{row['kv_fraction']:.4f} {long[key]:.4f}", flush=True)
        row["ratio_2048"] = long[key]
    kept, text = (seeds, table_of_seeds(seeds)) if options.each else (seeds[0], table(seeds[0]))
    keep_results(options.out, options.name, text, kept)


if __name__ == "__main__":
    run()
