"""``bench``: memory and speed of one map beside the full cache, measured and predicted.

Without ``map=`` it calculates what ``compression.ratios`` would buy for this model.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from kvsharer_exp.cli.commands.evaluate import read_map
from kvsharer_exp.cli.commands.session import Session, identify, open_session, start_run
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.measure.benchmark import check_length, measure
from kvsharer_exp.measure.prediction import calculate, predict
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import attention_layers, check_map
from kvsharer_exp.reporting.figures.bench import bench_figure
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.values.sharing_map import SharingMap


def run(config: Config) -> None:
    """Write ``result.json`` with one cell per batch and context."""
    with open_session(config) as session:
        if config.map is None:
            _calculate(session)
        else:
            _measure(session, read_map(config, session.tracker))


def _measure(session: Session, sharing_map: SharingMap) -> None:
    config, wanted = session.config, session.config.bench
    check_map(sharing_map, attention_layers(session.model))
    _check_contexts(session, wanted.new_tokens)
    start_run(session, kv_source_layers=str(sharing_map), digest=sharing_map.digest)
    cells = []
    for batch, context in product(wanted.batch_sizes, wanted.contexts):
        measured = measure(
            session.model,
            sharing_map,
            batch=batch,
            context=context,
            new_tokens=wanted.new_tokens,
            repeats=wanted.repeats,
            seed=config.seed,
        )
        predicted = predict(session.model, sharing_map, batch=batch, context=context)
        cells.append({"batch": batch, "context": context, **measured, "predicted": predicted})
        session.say(f"measured batch {batch}, context {context}")
        _log(session, cells[-1])
    session.console.print(f"map {sharing_map} (cache and memory in MiB, medians, lowest–highest)")
    session.console.print(cells_table(cells))
    sentence = where_from(cells[-1])
    session.console.print(sentence)
    size = f"{len(sharing_map.targets)} of {session.num_layers} layers shared"
    picture = save_png(bench_figure(cells, f"{config.model.name}, {size}"))
    (session.folder / "bench.png").write_bytes(picture)
    session.tracker.log_bytes(session.run_id, picture, "bench.png")
    session.finish(
        {
            **identify(sharing_map),
            "footprint": footprint(session.model, sharing_map).to_dict(),
            "threads": _threads(),
            "cells": cells,
            "where_from": sentence,
        },
        then=f"kvsharer export model={config.model.name} map={sharing_map}",
    )


def _calculate(session: Session) -> None:
    config, wanted = session.config, session.config.bench
    sizes = [num_targets(ratio, session.num_layers) for ratio in config.compression.ratios]
    _check_contexts(session, 0)
    start_run(session)
    memory = int(wanted.memory_gib * 2**30)
    table = TurningTable(
        "batch", "context", "compression", "shared", "KV MiB", "saved MiB", "max batch"
    )
    cells: list[dict[str, Any]] = []
    for batch, context in product(wanted.batch_sizes, wanted.contexts):
        rows = []
        for ratio, size in zip(config.compression.ratios, sizes, strict=True):
            row = calculate(session.model, size, batch=batch, context=context, memory_bytes=memory)
            rows.append({"compression": ratio, **row})
            table.add_row(
                *(str(batch), str(context), f"{ratio:.1%}", f"{size}/{session.num_layers}"),
                f"{_mib(row['kv_bytes']['full'])} → {_mib(row['kv_bytes']['shared'])}",
                _mib(row["kv_bytes_saved"]),
                f"{row['largest_batch']['full']} → {row['largest_batch']['shared']}",
            )
        cells.append({"batch": batch, "context": context, "predicted": rows})
    session.console.print(table)
    session.console.print(
        f"max batch: sequences whose KV fits {wanted.memory_gib:g} GiB beside the weights "
        "(activations not counted), full → shared and exported"
    )
    if not cells[0]["predicted"][0]["exact"]:
        session.console.print("layers differ in KV: a target is taken to be the average layer")
    session.finish(
        {"memory_gib": wanted.memory_gib, "cells": cells},
        then=f"kvsharer search model={config.model.name}",
    )


def where_from(cell: dict[str, Any]) -> str:
    """One sentence on where the difference between full and shared comes from, by the shapes."""
    predicted = cell["predicted"]
    copies = predicted["concatenation_bytes_per_step"]
    copied, weights = copies["full"] - copies["shared"], predicted["kv_weight_bytes_saved"]
    if not copied:
        return "The map shares no layer, so nothing is saved and both columns are the same model."
    moved = copied + weights
    return (
        f"At batch {cell['batch']}, context {cell['context']} a decode step moves "
        f"{_mib(moved)} MiB less: {copied / moved:.0%} of it are DynamicCache's concatenation "
        f"copies, {weights / moved:.0%} the targets' K/V projections; attention reads stay the "
        f"same, prefill saves only {1 - 1 / predicted['prefill_speedup']:.1%} of its FLOPs, and "
        f"the memory freed holds a {1 / predicted['kv_fraction']:.2f} times larger batch."
    )


def _check_contexts(session: Session, new_tokens: int) -> None:
    longest = max(session.config.bench.contexts) + new_tokens
    check_length(session.model, longest, "bench.contexts with bench.new_tokens")


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _log(session: Session, cell: dict[str, Any]) -> None:
    where = f"batch_{cell['batch']}/context_{cell['context']}"
    metrics = {f"{where}/speedup/{key}": value for key, value in cell["speedup"].items()}
    for side in ("full", "shared"):
        metrics[f"{where}/{side}/cache_bytes"] = cell[side]["cache_bytes"]
        for key in ("prefill_seconds", "decode_tokens_per_second"):
            metrics[f"{where}/{side}/{key}"] = cell[side][key]["median"]
    session.tracker.log_metrics(session.run_id, metrics)


def cells_table(cells: list[dict[str, Any]]) -> TurningTable:
    """Medians (lowest – highest) of both; how many times better shared is, and the prediction."""
    memory = "peak_memory_bytes"
    label = "peak"
    if memory not in cells[0]["full"]:
        memory, label = "resident_bytes", "RSS"
    table = TurningTable("batch×ctx", "", "cache", label, "prefill s", "tokens/s")
    for cell in cells:
        where = f"{cell['batch']}×{cell['context']}"
        for side in ("full", "shared"):
            got = cell[side]
            table.add_row(
                where,
                side,
                _mib(got["cache_bytes"]),
                _mib(got[memory]["median"]),
                _spread(got["prefill_seconds"], 3),
                _spread(got["decode_tokens_per_second"], 2),
            )
            where = ""
        smaller = cell["full"]["cache_bytes"] / cell["shared"]["cache_bytes"]
        said, faster = cell["predicted"], cell["speedup"]
        measured = [f"×{faster['prefill']:.3f}", f"×{faster['decode']:.3f}"]
        by_shapes = [f"×{said['prefill_speedup']:.3f}", f"×{said['decode_speedup']:.3f}"]
        table.add_row("", "better", f"×{smaller:.3f}", "", *measured)
        fewer = f"×{1 / said['kv_fraction']:.3f}"
        table.add_row("", "predicted", fewer, "", *by_shapes, end_section=True)
    return table


def _spread(values: dict[str, float], digits: int) -> str:
    low, high = values["min"], values["max"]
    return f"{values['median']:.{digits}f}\n({low:.{digits}f}–{high:.{digits}f})"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.2f}"
