"""The command ``bench``: memory and speed of one plan or map and of the full cache.

They are measured, and predicted from the shapes. Without
``plan=`` and ``map=`` the command calculates what the
``compression.ratios`` would save for this model. With ``engine=vllm`` it measures in vLLM.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.plan_words import counted, kind_of, unseen_words
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.result_file import identify, tags_of
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.engine_bench import bench_in_engine
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.measure.benchmark import check_length, measure
from kvsharer_exp.measure.prediction import calculate, predict
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.reporting.bench_table import ROWS_PER_CELL, cells_table, mib, where_from
from kvsharer_exp.reporting.figures.bench import bench_figure
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.search.paper.greedy import num_targets


def run(config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, plans: Plans) -> None:
    """Write ``result.json`` with one cell for each batch size and context."""
    if config.engine.name == "vllm":
        bench_in_engine(config, log, loaded, windows, plans)
    elif config.map is None and config.plan is None:
        _calculate(config, log, loaded, windows)
    else:
        _measure(config, log, loaded, windows, plans)


def _measure(
    config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, plans: Plans
) -> None:
    wanted, plan = config.bench, plans.plan
    plans.check()
    _check_contexts(config, loaded, wanted.new_tokens)
    log.start(loaded.description, windows.texts, **tags_of(plan))
    loaded.tell_contexts()
    fitted = plans.fitted
    plans.keep(fitted)
    cells = []
    for batch, context in product(wanted.batch_sizes, wanted.contexts):
        size = {"batch": batch, "context": context, "new_tokens": wanted.new_tokens}
        measured = measure(loaded.model, fitted, **size, repeats=wanted.repeats, seed=config.seed)
        predicted = predict(loaded.model, plan, **size)
        cells.append({"batch": batch, "context": context, **measured, "predicted": predicted})
        log.say(f"measured batch {batch}, context {context}")
        log.log_metrics(_metrics(cells[-1]))
    kind = kind_of(plan)
    log.console.print(f"{kind} {plan} (cache and memory in MiB, medians, lowest–highest)")
    log.console.print(TurningTable.of(cells_table(cells, kind), section=ROWS_PER_CELL))
    sentence = where_from(cells[-1], kind)
    log.console.print(sentence)
    for context in wanted.contexts:
        if unseen := unseen_words(plan, context + wanted.new_tokens, context):
            log.say(f"bench.contexts={context} is too small for {unseen}")
    title = f"{loaded.name}, {counted(plan)}"
    log.keep("bench.png", save_png(bench_figure(cells, title)))
    log.finish(
        {
            **identify(plan),
            "footprint": footprint(loaded.model, plan, context=config.footprint.context).to_dict(),
            "threads": _threads(),
            "cells": cells,
            "where_from": sentence,
        },
        then=next_command(config, "evaluate" if kind == "plan" else "export", plans.word),
    )


def _calculate(config: Config, log: RunLog, loaded: LoadedModel, windows: Windows) -> None:
    wanted, ratios = config.bench, config.compression.ratios
    sizes = [num_targets(ratio, loaded.num_layers) for ratio in ratios]
    _check_contexts(config, loaded, 0)
    log.start(loaded.description, windows.texts)
    memory = int(wanted.memory_gib * 2**30)
    table = TurningTable(
        "batch", "context", "compression", "shared", "KV MiB", "saved MiB", "max batch"
    )
    cells: list[dict[str, Any]] = []
    for batch, context in product(wanted.batch_sizes, wanted.contexts):
        rows = []
        for ratio, size in zip(ratios, sizes, strict=True):
            row = calculate(loaded.model, size, batch=batch, context=context, memory_bytes=memory)
            rows.append({"compression": ratio, **row})
            table.add_row(
                *(str(batch), str(context), f"{ratio:.1%}", f"{size}/{loaded.num_layers}"),
                f"{mib(row['kv_bytes']['full'])} → {mib(row['kv_bytes']['shared'])}",
                mib(row["kv_bytes_saved"]),
                f"{row['largest_batch']['full']} → {row['largest_batch']['shared']}",
            )
        cells.append({"batch": batch, "context": context, "predicted": rows})
    log.console.print(table)
    log.console.print(
        f"max batch: sequences whose KV fits {wanted.memory_gib:g} GiB beside the weights "
        "(activations not counted), full → shared and exported"
    )
    if not cells[0]["predicted"][0]["exact"]:
        log.console.print("layers differ in KV: a target is taken to be the average layer")
    log.finish(
        {"memory_gib": wanted.memory_gib, "cells": cells},
        then=next_command(config, "search"),
    )


def _check_contexts(config: Config, loaded: LoadedModel, new_tokens: int) -> None:
    longest = max(config.bench.contexts) + new_tokens
    check_length(loaded.model, longest, "bench.contexts with bench.new_tokens")


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _metrics(cell: dict[str, Any]) -> dict[str, float]:
    where = f"batch_{cell['batch']}/context_{cell['context']}"
    metrics = {f"{where}/speedup/{key}": value for key, value in cell["speedup"].items()}
    for side in ("full", "shared"):
        metrics[f"{where}/{side}/cache_bytes"] = cell[side]["cache_bytes"]
        for key in ("prefill_seconds", "decode_tokens_per_second"):
            metrics[f"{where}/{side}/{key}"] = cell[side][key]["median"]
    return metrics
