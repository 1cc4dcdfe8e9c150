"""What one layer loses when it reads another, is deleted, or has a stand-in: the same zero bytes.

    python tests/benchmarks/single_layers.py [--model smollm2] [--dtype bfloat16] [--out FOLDER]

Each row is a layer. Its columns are the KL on 8 × 256 tokens of calibration text when this layer
alone does without KV: by the best share (the least KL of the three sources of least block error),
without attention, by a constant and by an affine stand-in. The stand-ins are fitted on 96 × 256
other tokens, and choose their ridge on a quarter of those.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvsharer_exp.measure.machine import settle

settle()

from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.windows import token_windows
from kvsharer_exp.measure.calibration import block_errors
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.fits import fit_actions
from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.load import load_model
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.plan import KVPlan
from tests.benchmarks.kept import keep_results

SCORED, FITTED, SOURCES = 8, 96, 3
HEADER = ["layer", "best share", "of layer", "deleted", "constant", "affine", "affine / share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    windows = token_windows(
        split_texts().calibration,
        tokenizer,
        num_windows=SCORED + FITTED,
        window_tokens=256,
        seed=0,
    )
    evaluator = Evaluator(model, windows[:SCORED])
    full = KVPlan.full(evaluator.num_layers)
    errors = block_errors(model, windows[:SCORED])
    wanted: dict[int, list[Action]] = {i: [Constant(), Affine()] for i in range(full.num_layers)}
    fits = fit_actions(model, windows[SCORED:], wanted)

    def loss(layer: int, action: Action, fit: Fit | None = None) -> float:
        plan = FittedPlan(full.replace(layer, action), {} if fit is None else {layer: fit})
        return evaluator.score(plan).kl

    rows = []
    for layer in range(full.num_layers):
        row: dict = {"layer": layer, "deleted": loss(layer, Drop())}
        for name, action in (("constant", Constant()), ("affine", Affine())):
            row[name] = loss(layer, action, fits[layer, action])
        able = [s for s, error in enumerate(errors[layer]) if error < float("inf")]
        nearest = sorted(able, key=lambda source: errors[layer][source])[:SOURCES]
        shares = {source: loss(layer, Read(source)) for source in nearest}
        if shares:
            row["source"] = min(shares, key=lambda source: shares[source])
            row["share"] = shares[row["source"]]
        rows.append(row)
        print(row, flush=True)
    shown = [HEADER, *map(_cells, rows)]
    able = [row for row in rows if "share" in row]
    third = sum(row["affine"] <= row["share"] / 3 for row in able)
    said = (
        f"The affine stand-in's KL is at most a third of the best share's at {third} of the "
        f"{len(able)} layers that can share."
    )
    print(f"\n{to_markdown(shown)}\n{said}")
    held = {"model": options.model, "dtype": options.dtype, "rows": rows}
    page = f"{to_markdown(shown)}\n{said}\n"
    keep_results(options.out, "single_layers", page, held, values="layers")


def _cells(row: dict) -> list[str]:
    numbers = [f"{row[name]:.4f}" for name in ("deleted", "constant", "affine")]
    if "share" not in row:
        return [str(row["layer"]), "–", "–", *numbers, "–"]
    ratio = f"{row['affine'] / row['share']:.2f}"
    return [str(row["layer"]), f"{row['share']:.4f}", str(row["source"]), *numbers, ratio]


if __name__ == "__main__":
    main()
