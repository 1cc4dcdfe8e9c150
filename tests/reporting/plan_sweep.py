"""A small sweep whose front has plans that are no maps, for the tests of what is shown of it."""

from kvsharer_exp.reporting.sweep_result import SweepResult
from kvsharer_exp.search.front import GrowingFront, pareto_front
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import FrontEntry, TrialResult

FULL = {"kl": 0.0, "perplexity/report": 22.0}


def result(
    number: int, text: str, kv_fraction: float, kl: float, origin: str = "sampler"
) -> TrialResult:
    size = Footprint(1024 * kv_fraction, kv_fraction, 2**20, context=2048)
    plan = KVPlan.parse(text)
    scores = {"kl": kl}
    return TrialResult(number, {}, plan, scores, size, "complete", "fit", 1.0, -kl, origin)


def entry(member: TrialResult, report: float, run_id: str = "") -> FrontEntry:
    sources = None if member.sharing_map is None else member.sharing_map.kv_source_layers
    return FrontEntry(
        kv_source_layers=sources,
        digest=member.plan.digest,
        num_shared=member.num_shared,
        kv_fraction=member.footprint.kv_fraction,
        scores={"kl": member.scores["kl"], "perplexity/report": report},
        retained={"perplexity/report": 22 / report},
        mlflow_run_id=run_id,
        origin=member.origin,
        plan=str(member.plan),
        kv_bytes_per_token=member.footprint.kv_bytes_per_token,
        footprint_context=2048,
        parameter_bytes_saved=2**20,
    )


RESULTS = [
    result(0, "0_1q8_2q8_3q4", 0.5156, 0.004),  # shares no layer, and is not the full cache
    result(1, "0_1_0_3", 0.75, 0.003),
    result(2, "0_1_1_1", 0.5, 0.4, "paper greedy"),
    result(3, "0_1q4s4_0k1v_a", 0.3281, 0.03),
    result(4, "0_0_x_c", 0.25, 0.9),
    result(5, "0_1_2_2", 0.75, 0.02),
]
FRONT = pareto_front(RESULTS)
ENTRIES = [entry(member, 22 + 20 * member.scores["kl"]) for member in FRONT]
SWEEP = SweepResult(
    model="tiny",
    study="a-study",
    fitness="kl",
    asked={"plans": "6"},
    entries=ENTRIES,
    full_scores=FULL,
    results=RESULTS,
    front=FRONT,
    reference_maps={"paper greedy": RESULTS[2:3]},
    volumes=GrowingFront(RESULTS, (1.0, -2.0)).volumes,
    distances=[[float(i + j) for j in range(4)] for i in range(4)],
    distance="cosine",
    environment={"seed": "7"},
)
