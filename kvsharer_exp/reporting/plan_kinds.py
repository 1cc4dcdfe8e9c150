"""Count what the layers of a plan do, by kind, and say it in a few words.

Tables, pictures and MLflow name a sharing map by its number of shared layers, like ``4/30``. A plan
that is no map has no such number. Sentences and MLflow name it by a `summary`, like ``24 own at 4
bits, 4 affine, 2 read``. Tables list plans that such words do not tell apart, so they have the
`action_counts`, like ``17×q4g128s4 7×q3s4 4×affine 2×read``.
"""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.actions.registry import OURS
from kvsharer_exp.values.plan import KVPlan

_PART = 40  # the most characters of the readable text of one action
_CELL = 64  # the most characters of a plan in a table


def is_map(plan: KVPlan) -> bool:
    """Whether the plan is a sharing map: its layers own in 16 bits or read, and nothing else."""
    return plan.sharing_map is not None


def kinds_of(plan: KVPlan) -> dict[str, int]:
    """How many layers do each kind of action: ``own`` first, then the most frequent kinds.

    A layer that reads keys and values of two layers counts as ``read``.
    """
    names = [_kind(action.name) for action in plan.actions]
    order = [_kind(action.name) for action in OURS]
    counts = Counter(names)
    known = {name: place for place, name in reversed(list(enumerate(order)))}

    def place(name: str) -> tuple[bool, int, int]:
        return name != Own.name, -counts[name], known.get(name, len(order))

    return {name: counts[name] for name in sorted(counts, key=place)}


def _kind(name: str) -> str:
    return Read.name if name == ReadKV.name else name


def num_quantised(plan: KVPlan) -> int:
    """How many layers keep their KV in fewer than 16 bits."""
    return sum(isinstance(action, Own) and action.quantised for action in plan.actions)


def num_bounded(plan: KVPlan) -> int:
    """How many layers hold the KV of some tokens only."""
    return sum(action.bounded for action in plan.actions)


def mean_bits(plan: KVPlan) -> float:
    """The mean number of bits over the layers that keep their own KV, without scales and sinks."""
    return fmean(action.bits for action in plan.actions if isinstance(action, Own))


def summary(plan: KVPlan) -> str:
    """The kinds with their counts, and of owners the mean bits and how many let tokens go.

    >>> summary(KVPlan.parse("0_1q4w4+60_0_a_a"))
    '2 own at 10 bits (1 of some tokens), 2 affine, 1 read'
    """
    parts = []
    for kind, count in kinds_of(plan).items():
        quantised = kind == Own.name and num_quantised(plan)
        bits = f" at {mean_bits(plan):.3g} bits" if quantised else ""
        bounded = num_bounded(plan) if kind == Own.name else 0
        parts.append(f"{count} {kind}{bits}" + (f" ({bounded} of some tokens)" if bounded else ""))
    return ", ".join(parts)


def size_words(plan: KVPlan) -> str:
    """``4/30 shared`` for a map, and the `summary` of any other plan."""
    if is_map(plan):
        return f"{len(plan.targets)}/{plan.num_layers} shared"
    return summary(plan)


def action_counts(plan: KVPlan) -> str:
    """``4/30 shared`` for a map, and of any other plan how many layers do each action.

    Owners come first, from most bits to fewest, each with the text of its precision and keep. A
    plan of so many different actions that a cell has no room for them has its `summary`.

    >>> action_counts(KVPlan.parse("0_1q3s4_2q4_3q4_0_a"))
    '1×own 2×q4 1×q3s4 1×read 1×affine'
    """
    if is_map(plan):
        return size_words(plan)
    owners = Counter(
        (-action.bits, action.text(layer).removeprefix(str(layer)) or Own.name)
        for layer, action in enumerate(plan.actions)
        if isinstance(action, Own)
    )
    counts = {text: owners[bits, text] for bits, text in sorted(owners)}
    counts |= {kind: count for kind, count in kinds_of(plan).items() if kind != Own.name}
    text = " ".join(f"{count}×{text}" for text, count in counts.items())
    return text if len(text) <= _CELL else summary(plan)


def plan_params(plan: KVPlan) -> dict[str, str]:
    """What MLflow keeps of a plan as params, so that its UI can compare and sort runs by them.

    Every kind of ours has its count, also if it is 0. ``actions`` says layer by layer what is done.
    """
    counts = {_kind(action.name): 0 for action in OURS} | kinds_of(plan)
    return {
        "actions": ", ".join(_readable(plan, layer) for layer in range(plan.num_layers)),
        "own": str(counts.pop(Own.name)),
        "quantised": str(num_quantised(plan)),
        "mean_bits": f"{mean_bits(plan):.4g}",
        "bounded": str(num_bounded(plan)),
        **{name: str(count) for name, count in counts.items()},
    }


def _readable(plan: KVPlan, layer: int) -> str:
    action = plan.actions[layer]
    match action:
        case Own():
            words = f"own {action.words}"
        case Read(source=source):
            words = f"read {source}"
        case ReadKV(key_source=keys, value_source=values):
            words = f"read {keys} keys {values} values"
        case _:
            words = action.name[:_PART]
    return f"{layer} {words}"


def kv_percent(fraction: float, *, fine: bool) -> str:
    """The share of the KV that is kept; ``fine``: with one decimal, if it is not the whole."""
    return f"{fraction:.1%}" if fine and fraction < 1 else f"{fraction:.0%}"
