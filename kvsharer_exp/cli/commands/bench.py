"""The command ``bench``: memory and speed of one map and of the full cache.

They are measured, and predicted from the shapes. Without ``map=`` the command calculates what the
``compression.ratios`` would save for this model.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.named_maps import read_map
from kvsharer_exp.cli.session.result_file import identify
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.measure.benchmark import check_length, measure
from kvsharer_exp.measure.prediction import calculate, predict
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.reporting.bench_table import ROWS_PER_CELL, cells_table, mib, where_from
from kvsharer_exp.reporting.figures.bench import bench_figure
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.values.sharing_map import SharingMap


def run(config: Config, log: RunLog, loaded: LoadedModel, windows: Windows) -> None:
    """Write ``result.json`` with one cell for each batch size and context."""
    if config.map is None:
        _calculate(config, log, loaded, windows)
    else:
        _measure(config, log, loaded, windows, read_map(config, log.tracker))


def _measure(
    config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, sharing_map: SharingMap
) -> None:
    wanted = config.bench
    loaded.check(sharing_map)
    _check_contexts(config, loaded, wanted.new_tokens)
    log.start(
        loaded.description,
        windows.texts,
        kv_source_layers=str(sharing_map),
        digest=sharing_map.digest,
    )
    cells = []
    for batch, context in product(wanted.batch_sizes, wanted.contexts):
        measured = measure(
            loaded.model,
            sharing_map,
            batch=batch,
            context=context,
            new_tokens=wanted.new_tokens,
            repeats=wanted.repeats,
            seed=config.seed,
        )
        predicted = predict(loaded.model, sharing_map, batch=batch, context=context)
        cells.append({"batch": batch, "context": context, **measured, "predicted": predicted})
        log.say(f"measured batch {batch}, context {context}")
        log.log_metrics(_metrics(cells[-1]))
    log.console.print(f"map {sharing_map} (cache and memory in MiB, medians, lowest–highest)")
    log.console.print(TurningTable.of(cells_table(cells), section=ROWS_PER_CELL))
    sentence = where_from(cells[-1])
    log.console.print(sentence)
    size = f"{len(sharing_map.targets)} of {loaded.num_layers} layers shared"
    log.keep("bench.png", save_png(bench_figure(cells, f"{loaded.name}, {size}")))
    log.finish(
        {
            **identify(sharing_map),
            "footprint": footprint(loaded.model, sharing_map).to_dict(),
            "threads": _threads(),
            "cells": cells,
            "where_from": sentence,
        },
        then=f"kvsharer export model={loaded.name} map={sharing_map}",
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
        then=f"kvsharer search model={loaded.name}",
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
