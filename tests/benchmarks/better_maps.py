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
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from kvsharer_exp.machine import settle

settle()

from kvsharer_exp.models import load_model  # noqa: E402
from kvsharer_exp.report import to_markdown  # noqa: E402
from kvsharer_exp.scoring import window_losses  # noqa: E402
from kvsharer_exp.search.spaces.base import from_pairs  # noqa: E402
from kvsharer_exp.sharing.runtime import share_kv  # noqa: E402
from kvsharer_exp.sharing_map import SharingMap  # noqa: E402
from kvsharer_exp.statistics import t_interval  # noqa: E402
from kvsharer_exp.texts import split_texts, token_windows  # noqa: E402
from kvsharer_exp.tracking import environment  # noqa: E402

STAGES = ((24, 40), (72, 16), (240, 16))  # windows, and how many maps are left after them
SHOWN = 10


class Losses:
    """Of maps on the first held-out windows; ``record`` keeps them beside ``settings``, the model
    and its type, and gives those made with the same."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, str], record: Path) -> None:
        self._model, self._record = model, record
        self._about = {"options": settings, "environment": environment()}
        self._windows = token_windows(
            split_texts().report, tokenizer, num_windows=STAGES[-1][0], window_tokens=256, seed=0
        )
        held = json.loads(record.read_text()) if record.exists() else {}
        same = held.get("options") == settings
        self._known: dict[str, list[float]] = held["losses"] if same else {}
        self._full = SharingMap.identity(model.config.num_hidden_layers)

    def increase(self, sharing_map: SharingMap, windows: int) -> list[float]:
        """By window, the log of its perplexity over the full cache's."""
        shared, full = self._of(sharing_map, windows), self._of(self._full, windows)
        return [lost - kept for lost, kept in zip(shared, full, strict=True)]

    def mean(self, sharing_map: SharingMap, windows: int) -> float:
        return fmean(self.increase(sharing_map, windows))

    def _of(self, sharing_map: SharingMap, windows: int) -> list[float]:
        known = self._known.setdefault(str(sharing_map), [])
        if len(known) < windows:
            with share_kv(self._model, sharing_map):
                lost = window_losses(self._model, self._windows[len(known) : windows])
            known += [round(loss, 6) for loss in lost]
            self._record.write_text(json.dumps({**self._about, "losses": self._known}) + "\n")
        return known[:windows]


def best(maps: Iterable[SharingMap], losses: Losses) -> list[SharingMap]:
    """Those that the last stage leaves, best first."""
    left = list(maps)
    for windows, kept in STAGES:
        print(f"{len(left)} maps on {windows} windows", flush=True)
        left.sort(key=lambda sharing_map: losses.mean(sharing_map, windows))
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


def table(maps: Iterable[SharingMap], losses: Losses) -> str:
    """Markdown: perplexity over the full cache's with its 95 % interval over windows."""
    lines = [["map", "ppl ratio", "95 %"]]
    for sharing_map in maps:
        lost = t_interval(losses.increase(sharing_map, STAGES[-1][0]))
        mean, low, high = (f"{math.exp(value):.4f}" for value in (lost.mean, lost.low, lost.high))
        reads = (f"{layer}←{sharing_map.kv_source_layers[layer]}" for layer in sharing_map.targets)
        lines.append([" ".join(reads), mean, f"{low} to {high}"])
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
    losses = Losses(model, tokenizer, settings, options.out / "better_maps.json")
    layers = model.config.num_hidden_layers
    chosen = [
        from_pairs(layers, [(target, 0) for target in targets])
        for targets in itertools.combinations(options.targets, options.size)
    ]
    found = best(chosen, losses)
    around = neighbours(found[0]) - set(chosen)
    closer = best(sorted(around, key=lambda m: m.kv_source_layers), losses)
    ranked = sorted([*found, *closer], key=lambda m: losses.mean(m, STAGES[-1][0]))
    text = table(ranked[:SHOWN], losses)
    (options.out / "better_maps.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
