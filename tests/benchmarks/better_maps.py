"""Is there a better map of one size than the sweeps of ``front_quality.py`` found?

    python tests/benchmarks/better_maps.py [--size 4] [--targets 5 6 7 8 17 20 25 26 29]

On the held-out windows of that benchmark, which no search may use: first every choice of ``--size``
of the ``--targets``, all reading layer 0, then every map that has another target or another source
in one pair of the best of them. All meet the first 24 windows, the best 40 of those 72, the best
16 of those all 240. Writes ``better_maps.md`` (the best ten) and ``.json`` to ``--out``;
run again, it goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from search_efficiency import HeldOut

from kvsharer_exp.model.load import load_model
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.search.spaces.base import from_pairs
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.values.sharing_map import SharingMap

STAGES = ((24, 40), (72, 16), (240, 16))  # windows, and how many maps are left after them
SHOWN = 10


def best(
    maps: Iterable[SharingMap], held_out: HeldOut, keep: Callable[[], None]
) -> list[SharingMap]:
    """Those that the last stage leaves, best first; ``keep`` is called after each one measured."""
    left = list(maps)
    for windows, kept in STAGES:
        for sharing_map in left:
            if len(held_out.known.get(sharing_map, ())) < windows:
                held_out(sharing_map, windows)
                keep()
        left.sort(key=lambda sharing_map: held_out(sharing_map, windows))
        found = f"{held_out(left[0], windows):.4f} ({reads(left[0])})"
        print(f"{len(left)} maps on {windows} windows, the best: {found}", flush=True)
        left = left[:kept]
    return left


def neighbours(sharing_map: SharingMap) -> set[SharingMap]:
    """Every map in which one target is another layer, or reads another one."""
    layers, sources = sharing_map.num_layers, sharing_map.kv_source_layers
    found = set()
    for moved in sharing_map.targets:
        pairs = [(target, sources[target]) for target in sharing_map.targets if target != moved]
        used = {layer for pair in pairs for layer in pair}
        changed = [(moved, source) for source in range(moved)]
        changed += [(target, sources[moved]) for target in range(sources[moved] + 1, layers)]
        for target, source in changed:
            if target not in used and all(source != other for other, _ in pairs):
                found.add(from_pairs(layers, [*pairs, (target, source)]))
    return found - {sharing_map}


def reads(sharing_map: SharingMap) -> str:
    return " ".join(f"{t}←{sharing_map.kv_source_layers[t]}" for t in sharing_map.targets)


def table(maps: Iterable[SharingMap], held_out: HeldOut) -> str:
    """Markdown: perplexity over the full cache's with its 95 % interval over windows, and the least
    and the greatest ratio of draws as large as the first stage."""
    few = STAGES[0][0]
    lines = [["map", "ppl ratio", "95 %", f"draws of {few}"]]
    for sharing_map in maps:
        draws = held_out.draws(sharing_map, few)
        spans = (held_out.interval(sharing_map), (min(draws), max(draws)))
        spread = (f"{low:.4f} to {high:.4f}" for low, high in spans)
        lines.append([reads(sharing_map), f"{held_out(sharing_map):.4f}", *spread])
    return to_markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--targets", type=int, nargs="+", default=[5, 6, 7, 8, 17, 20, 25, 26, 29])
    parser.add_argument("--out", type=Path, default=Path("outputs/better_maps"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    settings = {"model": options.model, "dtype": options.dtype}
    record = options.out / "better_maps.json"
    held = json.loads(record.read_text()) if record.exists() else {}
    before = held["losses"] if held.get("options") == settings else {}
    known = {SharingMap.parse(text): losses for text, losses in before.items()}
    held_out = HeldOut(model, tokenizer, STAGES[-1][0], known)
    about = {"options": settings, "environment": environment()}

    def keep() -> None:
        losses = {str(sharing_map): lost for sharing_map, lost in known.items()}
        record.write_text(json.dumps({**about, "losses": losses}) + "\n")

    layers = model.config.num_hidden_layers
    chosen = [
        from_pairs(layers, [(target, 0) for target in targets])
        for targets in itertools.combinations(options.targets, options.size)
    ]
    found = best(chosen, held_out, keep)
    around = neighbours(found[0]) - set(chosen)
    closer = best(sorted(around, key=lambda m: m.kv_source_layers), held_out, keep)
    text = table(sorted([*found, *closer], key=held_out)[:SHOWN], held_out)
    (options.out / "better_maps.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
