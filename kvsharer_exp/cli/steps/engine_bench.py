"""Measure plans in vLLM beside the full cache: ``bench engine=vllm``.

Each plan is served in its turn, with the same KV memory, because two servers at work would disturb
each other. The turns run forward and back (full, plan, plan, full, …), so that neither is always
the first and a machine that slows down slows both. A round is one turn of every plan. Its ratios
are of turns that are near in time, and their intervals are over the rounds.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, product
from statistics import median
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.plan_words import kind_of
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.result_file import identify, tags_of
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.engine_run import EngineRun
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.measure.benchmark import check_length
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import text_config
from kvsharer_exp.reporting.engine_table import engine_table, num_rows
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.reporting.plan_kinds import action_counts
from kvsharer_exp.shipping.vllm.folder import ExportFolder
from kvsharer_exp.shipping.vllm.load import Burst, LoadClient, requests_that_fit
from kvsharer_exp.shipping.vllm.server import Server
from kvsharer_exp.values.errors import at_least
from kvsharer_exp.values.intervals import ratio_interval
from kvsharer_exp.values.plan import KVPlan

FULL = "full"
_WARM_UP_TOKENS = 2

Cell = tuple[int, int]
"""A load and a context: the requests that are sent at once, and the tokens of each prompt."""


def bench_in_engine(
    config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, plans: Plans
) -> None:
    """Write ``result.json`` with the KV blocks of each plan, and a cell for each load and context.

    The plans are the full cache, that of ``plan=`` or ``map=``, and that of ``compare=`` if given.
    """
    wanted, plan = config.bench, plans.plan
    plans.check()
    at_least("bench.new_tokens", wanted.new_tokens, 2)
    at_least("bench.repeats", wanted.repeats, 2)
    longest = max(wanted.contexts) + wanted.new_tokens
    check_length(loaded.model, longest, "bench.contexts with bench.new_tokens")
    engine = EngineRun(config, log, loaded, longest)
    others = [other for other in (plan, plans.other) if other is not None]
    for one in (KVPlan.full(loaded.num_layers), *others):
        engine.check(one)
    log.start(loaded.description, windows.texts, **tags_of(plan))
    fitted = _fitted(loaded, plans)
    plans.keep(plans.fitted)
    sides: dict[str, dict[str, Any]] = {}
    busy: list[float] = []
    bursts: dict[Cell, dict[str, list[Burst]]] = defaultdict(lambda: defaultdict(list))
    with engine.exports(fitted) as exports:
        turns = groupby(turns_of(list(fitted), wanted.repeats), key=lambda turn: turn[1])
        for name, held in turns:
            with engine.serve(exports[name]) as server:
                sides.setdefault(name, _side(exports[name], server, config))
                for number, _ in held:
                    busy.append(os.getloadavg()[0])
                    _measure_turn(config, loaded, server, number, bursts, name)
                    log.say(f"measured round {number + 1} of {wanted.repeats} for {name}")
    cells = [_cell(cell, found, sides, wanted.new_tokens) for cell, found in bursts.items()]
    for cell in cells:
        log.log_metrics(_metrics(cell))
    log.console.print(f"{kind_of(plan)} {plan}")
    log.console.print(f"in {engine.environment}", markup=False)
    log.console.print(
        f"{config.serve.kv_gib or 'all'} GiB for KV, {engine.dtype}, {wanted.repeats} rounds; "
        f"{wanted.new_tokens} new tokens; medians, ratios to full with 95% intervals; "
        f"load average {min(busy):.1f}–{max(busy):.1f} on {os.cpu_count()} cores"
    )
    table = engine_table(sides, cells)
    log.console.print(TurningTable.of(table, section=num_rows(sides)))
    log.keep("bench.md", to_markdown(table))
    log.finish(
        {
            **identify(plan),
            "engine": {
                "name": "vllm",
                "versions": engine.versions,
                "dtype": engine.dtype,
                "eager": config.engine.eager,
                "kv_gib": config.serve.kv_gib,
            },
            "load_averages": busy,
            "plans": sides,
            "cells": cells,
        },
        then=next_command(config, "export", f"{kind_of(plan)}={plan}"),
    )


def turns_of(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """The turns of ``rounds``, as (round, name): forward, back, forward, ….

    >>> [name for _, name in turns_of(["A", "B"], 3)]
    ['A', 'B', 'B', 'A', 'A', 'B']
    """
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            yield number, name


def _fitted(loaded: LoadedModel, plans: Plans) -> dict[str, FittedPlan]:
    found = {FULL: FittedPlan.of(loaded.full_cache), kind_of(plans.plan): plans.fitted}
    return found if plans.other_fitted is None else {**found, "compare": plans.other_fitted}


def _side(export: ExportFolder, server: Server, config: Config) -> dict[str, Any]:
    """What the engine makes of its KV memory for one plan."""
    report, wanted = server.client.cache_report(), config.bench
    blocks = export.check_blocks(
        report,
        memory_bytes=server.serving.kv_bytes or 0,  # 0: nobody knows, so nothing is predicted
        dtype=server.serving.dtype,
        request_tokens=max(wanted.contexts) + wanted.new_tokens,
    )
    return {
        **identify(export.plan),
        "words": action_counts(export.plan),
        "owners": len(export.plan.owners),
        "num_blocks": report.num_blocks,
        "predicted_blocks": blocks.predicted.num_blocks,
        "block_size": report.block_size,
        "bytes_per_block": blocks.predicted.bytes_per_block,
        "requests_that_fit": {
            str(context): requests_that_fit(report, blocks.predicted, context + wanted.new_tokens)
            for context in wanted.contexts
        },
    }


def _measure_turn(
    config: Config,
    loaded: LoadedModel,
    server: Server,
    number: int,
    bursts: Mapping[Cell, Mapping[str, list[Burst]]],
    name: str,
) -> None:
    """Measure every load and context once; the prompts are the same for every plan of a round."""
    wanted, vocabulary = config.bench, text_config(loaded.model).vocab_size
    client = LoadClient(server.client.address, server.client.model)
    draw = random.Random(f"{config.seed} {number}")
    for load, context in product(wanted.batch_sizes, wanted.contexts):
        warm_up, *prompts = (
            [draw.randrange(vocabulary) for _ in range(context)] for _ in range(load + 1)
        )
        client.burst([warm_up], _WARM_UP_TOKENS)
        bursts[load, context][name].append(client.burst(prompts, wanted.new_tokens))


def _cell(
    cell: Cell,
    found: Mapping[str, Sequence[Burst]],
    sides: Mapping[str, Mapping[str, Any]],
    new_tokens: int,
) -> dict[str, Any]:
    load, context = cell
    return {
        "load": load,
        "context": context,
        "new_tokens": new_tokens,
        **{
            name: {
                "requests_that_fit": sides[name]["requests_that_fit"][str(context)],
                **cell_side(bursts, found[FULL]),
            }
            for name, bursts in found.items()
        },
    }


def cell_side(bursts: Sequence[Burst], full: Sequence[Burst]) -> dict[str, Any]:
    """The medians of a plan over the rounds, and its ratios to the full cache, round by round.

    The ratio of ``token_seconds`` is below 1 where a token takes less time than with the full
    cache.
    """
    quantities = ("tokens_per_second", "token_seconds")
    values = {key: [getattr(burst, key) for burst in bursts] for key in quantities}
    whole = {key: [getattr(burst, key) for burst in full] for key in quantities}
    return {
        **{
            key: {"median": median(held), "min": min(held), "max": max(held), "rounds": held}
            for key, held in values.items()
        },
        "preemptions": sum(burst.preemptions for burst in bursts),
        "ratios": {key: asdict(ratio_interval(values[key], whole[key])) for key in quantities},
    }


def _metrics(cell: Mapping[str, Any]) -> dict[str, float]:
    where = f"load_{cell['load']}/context_{cell['context']}"
    metrics = {}
    for name, side in cell.items():
        if isinstance(side, Mapping):
            metrics[f"{where}/{name}/requests_that_fit"] = side["requests_that_fit"]
            for key, inside in side["ratios"].items():
                metrics[f"{where}/{name}/{key}"] = side[key]["median"]
                metrics[f"{where}/{name}/ratio/{key}"] = inside["mean"]
    return metrics
