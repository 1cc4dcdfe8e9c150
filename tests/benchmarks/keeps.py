"""What each keep costs: prefill and decode beside the full cache, in turn, on SmolLM2.

    python -m tests.benchmarks.keeps --context 2048 --repeats 5 --out docs/results/keeps

One JSON line a keep: ratios of medians, above 1 where the keep is slower, and the seconds of a
prefill as lowest, median and highest. SnapKV needs the weights of a few queries, H2O all weights of
the prompt, which no kernel gives.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsharer_exp import KVPlan, load_model
from kvsharer_exp.measure.benchmark import measure
from kvsharer_exp.measure.machine import settle
from kvsharer_exp.reporting.markup import to_markdown
from tests.benchmarks.kept import keep_results

KEEPS = ("w4+{recent}", "snap0.25+32", "h0.25", "q4", "q4snap0.25+32", "q4h0.25")


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        ["keep", "KV", "prefill, × as long", "prefill, s", "full cache, s", "decode, × as long"]
    ]
    for line in lines:
        spreads = ["{1} ({0}–{2})".format(*line["seconds"][side]) for side in ("shared", "full")]
        share, slower = f"{line['bytes']:.1%}", (str(line[key]) for key in ("prefill", "decode"))
        rows.append([line["keep"], share, next(slower), *spreads, next(slower)])
    return to_markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keeps", nargs="*", default=KEEPS)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    settle()
    model, _ = load_model(wanted.model, dtype=wanted.dtype)
    layers, lines = model.config.num_hidden_layers, []
    for text in wanted.keeps:
        keep = text.format(recent=wanted.context // 4 - 4)
        plan = KVPlan.parse("_".join(f"{layer}{keep}" for layer in range(layers)))
        found = measure(
            model,
            plan,
            batch=1,
            context=wanted.context,
            new_tokens=wanted.new_tokens,
            repeats=wanted.repeats,
        )
        ratios = {name: round(1 / ratio, 3) for name, ratio in found["speedup"].items()}
        seconds = {
            side: [
                round(found[side]["prefill_seconds"][end], 2) for end in ("min", "median", "max")
            ]
            for side in ("full", "shared")
        }
        bytes_kept = found["shared"]["cache_bytes"] / found["full"]["cache_bytes"]
        line = {"keep": keep, **ratios, "seconds": seconds, "bytes": round(bytes_kept, 4)}
        lines.append(line)
        print(json.dumps(line), flush=True)
    keep_results(wanted.out, "keeps", table(lines), lines)


if __name__ == "__main__":
    main()
