"""Read the values that a finished run measured from its ``result.json``.

The command ``report`` calls `measured` for each run. `READERS` holds one reader for each command
that can be reported. A reader yields a `Measured` for every value of every map. It begins with the
values of the full cache if the run has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvsharer_exp.reporting.ablation import describe
from kvsharer_exp.reporting.measured import FinishedRun, Measured, undamaged
from kvsharer_exp.reporting.scored import scores_of
from kvsharer_exp.search.paper.arms import GIVEN
from kvsharer_exp.values.record import typed

_MIB, _MB = 2**20, 10**6
_VARIED = ("threshold", "path", "num_windows", "window_tokens", "states", "distance")
FULL = "full cache"


def measured(run: FinishedRun) -> list[Measured]:
    """Every value of a finished run; those of the full cache come first if the run has them."""
    with undamaged(run):
        return list(READERS[run.command](run))


def _base(run: FinishedRun, **changes: Any) -> Measured:
    """A blank value of the full cache in this run, with ``changes`` applied.

    The reader fills in ``quantity`` and ``value``. ``settings`` are those of the run that `_VARIED`
    names.
    """
    groups = {group: run.config.get(group, {}) for group in ("search", "calibration", "heldout")}
    settings = {
        f"{group}.{name}": value
        for group, values in groups.items()
        for name, value in values.items()
        if name in _VARIED
    }
    model = run.result["model"]
    blank = Measured(
        quantity="",
        value=0.0,
        model=run.model,
        model_id=typed(str, model["id"], "model.id"),
        num_layers=model["num_layers"],
        map=FULL,
        arm="",
        num_shared=0,
        requested=None,
        run_ids=(run.run_id,),
        run=run,
        settings=settings,
        experiment=run.experiment,
        kv_fraction=1.0,
    )
    return replace(blank, **changes)


def _of_search(run: FinishedRun) -> Iterator[Measured]:
    result = run.result
    arm = f"{result['order']}_{'tested' if result['acceptance'] else 'untested'}"
    for row in result["results"]:
        base = _base(
            run,
            map=describe(arm, {}),
            arm=arm,
            num_shared=row["found"],
            requested=row["requested"],
            kv_fraction=None,
        )
        base = replace(base, settings={**base.settings, "search.threshold": result["threshold"]})
        yield replace(base, quantity="search/seconds", value=row["seconds"])
        yield replace(base, quantity="search/candidates", value=row["candidates"])


def _of_sweep(run: FinishedRun) -> Iterator[Measured]:
    full = run.result["full"]["scores"]
    yield from scores_of(_base(run), full, full, intervals=_ends(run.result["full"]))
    tested = run.config.get("search", {}).get("acceptance", True)
    arms = {"paper greedy": "dissimilar_tested" if tested else "dissimilar_untested"}
    entries = [(entry, True) for entry in run.result["front"]]
    entries += [(entry, False) for entry in run.result.get("paper_greedy", [])]
    for entry, on_front in entries:
        plan, origin = _plan_beyond_maps(entry), entry["origin"]
        if entry["num_shared"] or plan:
            base = _base(
                run,
                map=", ".join(filter(None, ["front", origin])) if on_front else origin,
                arm=arms.get(origin, "front"),
                num_shared=None if plan else entry["num_shared"],
                plan=plan,
                kv_fraction=entry.get("kv_fraction"),
                run_ids=(entry["mlflow_run_id"] or run.run_id,),
            )
            yield from scores_of(base, entry["scores"], full, intervals=_ends(entry))


def _of_evaluate(run: FinishedRun) -> Iterator[Measured]:
    full = run.result["full"]["scores"]
    yield from scores_of(_base(run), full, full, intervals=_ends(run.result["full"]))
    base = _base(run, **_given(run.result))
    yield from scores_of(base, run.result["scores"], full, intervals=_ends(run.result))


def _ends(held: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The intervals that ``evaluate`` and ``sweep`` keep as [low, high]; older runs have none."""
    return {n: {"low": low, "high": high} for n, (low, high) in held.get("intervals", {}).items()}


def _given(result: Mapping[str, Any]) -> dict[str, Any]:
    """Which plan or map a run was given, as fields of `Measured`."""
    plan = _plan_beyond_maps(result)
    return {
        "map": f"{'plan' if plan else 'map'} {result['digest']}",
        "arm": GIVEN,
        "num_shared": None if plan else result["num_shared"],
        "plan": plan,
        "kv_fraction": result.get("footprint", {}).get("kv_fraction"),
    }


def _plan_beyond_maps(held: Mapping[str, Any]) -> str:
    """The text of a plan that is no map; empty for maps, which older files name without a text."""
    return str(held.get("plan") or "") if held.get("kv_source_layers") is None else ""


def _of_bench(run: FinishedRun) -> Iterator[Measured]:
    result = run.result
    if "engine" in result:  # loads on a server, which no table of the report has a place for
        return
    if "digest" in result:
        for cell in result["cells"]:
            yield from _timed(run, cell, **_given(result))
        return
    for cell in result["cells"]:
        where = f"batch {cell['batch']}, context {cell['context']}"
        sizes = [(row["num_shared"], row["kv_bytes"]) for row in cell["predicted"]]
        for num_shared, held in [(0, {"shared": sizes[0][1]["full"]}), *sizes]:
            base = _base(run, map=where, arm="calculated", num_shared=num_shared, kv_fraction=None)
            yield replace(base, quantity="bench/kv_mib", value=held["shared"] / _MIB)


def _of_ablate(run: FinishedRun) -> Iterator[Measured]:
    result = run.result
    full = result["full"]
    yield from scores_of(_base(run), full["scores"], full["scores"], intervals=full["intervals"])
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(_place(row), []).append(row)
    for cell in result["cells"]:
        ids = [row["mlflow_run_id"] for row in rows[_place(cell)] if row["mlflow_run_id"]]
        draws = f" (mean of {len(cell['found'])})" if len(cell["found"]) > 1 else ""
        base = _base(
            run,
            map=describe(cell["arm"], cell["variant"]) + draws,
            arm=cell["arm"],
            **_found(cell, rows[_place(cell)]),
            run_ids=tuple(ids) or (run.run_id,),
        )
        base = replace(base, settings={**base.settings, **cell["variant"]})
        means = {name: inside["mean"] for name, inside in cell["scores"].items()}
        if cell["arm"].endswith(("_tested", "_untested")):
            yield replace(base, quantity="search/seconds", value=cell["seconds"])
            yield replace(base, quantity="search/candidates", value=cell["evaluated"])
        inside = dict(cell["scores"])
        if len(cell["found"]) == 1:  # what is retained has no interval over draws
            inside |= rows[_place(cell)][0].get("intervals", {})
        yield from scores_of(base, means, full["scores"], intervals=inside, marks=cell["verdicts"])
    head = result["reference"]
    words = describe(head["arm"], head["variant"])
    for cell in result["timings"]:
        yield from _timed(run, cell, map=words, arm=head["arm"], **_timed_row(result, cell))


def _found(cell: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an arm found at a ratio, as fields of `Measured`: shared layers or a plan, and KV."""
    plan = _plan_beyond_maps(rows[0])
    if plan:
        return {"num_shared": None, "plan": plan, "kv_fraction": rows[0].get("kv_fraction")}
    same = len(set(cell["found"])) == 1
    return {
        "num_shared": cell["found"][0] if same else None,
        "requested": cell["requested"],
        "kv_fraction": cell.get("kv_fraction"),
    }


def _timed_row(result: Mapping[str, Any], timing: Mapping[str, Any]) -> dict[str, Any]:
    """What a timing is of, as fields of `Measured`: what its row of the first arm found."""
    place = _place({**result["reference"], "compression": timing["compression"]})
    row = next(row for row in result["rows"] if _place(row) == place)
    plan = _plan_beyond_maps(row)
    found = None if plan else row["found"]
    return {"num_shared": found, "plan": plan, "kv_fraction": row.get("kv_fraction")}


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['variant']} {row['arm']} {row['compression']}"


def _timed(
    run: FinishedRun,
    cell: Mapping[str, Any],
    *,
    map: str,
    arm: str,
    num_shared: int | None,
    plan: str = "",
    kv_fraction: float | None = None,
) -> Iterator[Measured]:
    """Yield the values of full and shared in one measured cell: a batch size and a length.

    A length is the number of prompt tokens + new tokens.
    """
    length = f"{cell['context']}+{cell['new_tokens']}"
    for side in ("full", "shared"):
        got = cell[side]
        base = _base(run, length=length, map=f"{FULL}, batch {cell['batch']}, {length}")
        if side == "shared":
            words = f"{map}, batch {cell['batch']}, {length}"
            base = replace(
                base, map=words, arm=arm, num_shared=num_shared, plan=plan, kv_fraction=kv_fraction
            )
        yield replace(base, quantity="bench/cache_mib", value=got["cache_bytes"] / _MIB)
        if "peak_memory_bytes" in got:
            peak = got["peak_memory_bytes"]["median"] / _MB
            yield replace(base, quantity="bench/memory_mb", value=peak)
        for name, key in (
            ("bench/prefill_seconds", "prefill_seconds"),
            ("bench/tokens_per_second", "decode_tokens_per_second"),
        ):
            spread = got[key]
            low, high = spread["min"], spread["max"]
            inside = {"low": low, "high": high} if low < high else {}
            yield replace(base, quantity=name, value=spread["median"], **inside)
        if side == "shared":
            yield replace(base, quantity="bench/decode_speedup", value=cell["speedup"]["decode"])


READERS: dict[str, Callable[[FinishedRun], Iterable[Measured]]] = {
    "search": _of_search,
    "sweep": _of_sweep,
    "evaluate": _of_evaluate,
    "bench": _of_bench,
    "ablate": _of_ablate,
}
"""The reader of each command whose runs can be reported."""
