"""A search that costs milliseconds: a space of plans, and workers that need no model.

It imports no torch, so that processes can be started and killed by the dozen.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from kvsharer_exp.search.bars import Bars
from kvsharer_exp.search.coordinator import Search
from kvsharer_exp.search.execution.processes import ProcessCrew
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.trial import TrialResult

ROOT = Path(__file__).parents[2]
LAYERS = 10
MAKE = "tests.search.cheap_scores:make_score"
PAIRS = tuple(LayerPair(t, s, float(t - s)) for t in range(LAYERS) for s in range(t))


class EveryPlan:
    """Plans whose layers keep their KV in 16 or 4 bits, or drop it; layer 0 keeps it."""

    ranking = DissimilarityRanking("m", "d", LAYERS, PAIRS)
    max_shared = LAYERS - 1
    holds_plans = True

    def distributions(self) -> dict[str, BaseDistribution]:
        return {f"{layer}": CategoricalDistribution(["", "q4", "x"]) for layer in range(1, LAYERS)}

    def decode(self, params: Mapping[str, Any]) -> KVPlan:
        texts = [params[str(layer)] for layer in range(1, LAYERS)]
        own = [t if t == "x" else f"{layer}{t}" for layer, t in enumerate(texts, start=1)]
        return KVPlan.parse("_".join(["0", *own]))

    def encode(self, plan: Any) -> dict[str, Any] | None:
        texts = KVPlan.of(plan).texts
        return {
            str(i): "x" if texts[i] == "x" else texts[i][len(str(i)) :] for i in range(1, LAYERS)
        }


def size(plan: KVPlan) -> Footprint:
    kept = sum({"x": 0, "4": 1}.get(text[-1] if "q" in text else text, 4) for text in plan.texts)
    return Footprint(kept, kept / (4 * LAYERS), 0)


def search(seed: int = 0, sampler: str = "random") -> Search:
    space = EveryPlan()
    return Search(space, make_sampler(sampler, space=space, seed=seed), size, (), Bars())


def crew(folder: Path, **told: Any) -> ProcessCrew:
    settings = json.dumps({"log": str(folder / "scored.txt"), **told})
    return ProcessCrew(
        MAKE, settings, folder=folder / "workers", environments=[{"PYTHONPATH": str(ROOT)}]
    )


def scored(folder: Path) -> list[str]:
    """The plans that workers began, in this order."""
    return (folder / "scored.txt").read_text().split()


def plain(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """The results without what no two runs have in common."""
    return [{**result.to_dict(), "seconds": 0} for result in results]
