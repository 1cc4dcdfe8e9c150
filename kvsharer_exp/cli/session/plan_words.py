"""Say in words what a plan does: of one layer, and of all of them in a sentence.

The commands ``plan``, ``evaluate`` and ``bench`` print these.
"""

from __future__ import annotations

from kvsharer_exp.reporting.plan_kinds import num_bounded
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.plan import KVPlan


def action_words(action: Action, layer: int) -> str:
    """What ``layer`` does about its keys and values."""
    match action:
        case Own(keep=keep):
            of = "" if keep is None else f" of {keep.words}"
            if not action.quantised:
                return f"keeps its KV{of}"
            sinks = action.precision.sinks
            tokens = f", {sinks} first tokens in full" if sinks else ""
            groups = f", groups of {action.group}" if action.group != Own().group else ""
            return f"keeps its KV{of} in {action.bits} bits{groups}{tokens}"
        case Read(source=source):
            return f"reads the KV of layer {source}"
        case ReadKV(key_source=key, value_source=value):
            keys, values = (
                "its own" if source == layer else f"those of layer {source}"
                for source in (key, value)
            )
            return f"reads keys: {keys}, values: {values}"
        case Drop():
            return "has no attention"
        case Constant():
            return "adds a constant for its attention"
        case Affine():
            return "has an affine map for its attention"
    return f"does {action.name} ({action.text(layer)})"


def counted(plan: KVPlan) -> str:
    """How many layers share, are quantised, let tokens go and have no attention."""
    of = f"of {plan.num_layers} layers"
    quantised = sum(getattr(action, "quantised", False) for action in plan.actions)
    bounded = num_bounded(plan)
    without = sum(source is None for source in plan.key_sources)
    parts = [f"{len(plan.targets)} {of} shared"]
    if quantised:
        parts.append(f"{quantised} quantised")
    if bounded:
        parts.append(f"{bounded} of some tokens")
    if without:
        parts.append(f"{without} without attention")
    return ", ".join(parts)


def memory_words(plan: KVPlan, size: Footprint) -> str:
    """The sentence about the memory of a plan."""
    rate = size.kv_bytes_per_token
    per_token = f"{rate:,}" if isinstance(rate, int) else f"{rate:,.1f}"
    what = "K/V projections" if plan.sharing_map is not None else "parameters"
    unused = f"{size.parameter_bytes_saved:,} bytes of {what} unused"
    if size.parameter_bytes_saved < 0:
        unused = f"{-size.parameter_bytes_saved:,} bytes of parameters more"
    return (
        f"{counted(plan)}: {per_token} KV bytes per token ({size.kv_fraction:.1%} of full), "
        f"{unused}"
    )


def unseen_words(plan: KVPlan, tokens: int, prompt: int | None = None) -> str:
    """What a text of ``tokens`` tokens cannot tell of the plan; empty if it can tell all.

    The first ``prompt`` of them are a prompt, None: all.
    """
    return _all_held(_keeps(plan), tokens, prompt)


def unseen_lines(plan: KVPlan, key: str, tokens: int, prompt: int | None) -> list[str]:
    """A line for each key that gives a text too small to tell what the plan loses.

    ``key`` gives windows of so many ``tokens``, whose last one reads all others, and
    ``scoring.prompt_tokens`` their ``prompt``, None: they have none.
    """
    keeps = _keeps(plan)
    # SnapKV chooses once: what follows the prompt stays.
    once: set[Keep] = {keep for keep in keeps if isinstance(keep, SnapKV)}
    asked = ((key, keeps - once, tokens - 1), ("scoring.prompt_tokens", once, prompt or tokens))
    words = ((name, _all_held(some, size, prompt)) for name, some, size in asked)
    return [f"{name} is too small for {unseen}" for name, unseen in words if unseen]


def _keeps(plan: KVPlan) -> set[Keep]:
    return {action.keep for action in plan.actions if isinstance(action, Own) and action.keep}


def _all_held(keeps: set[Keep], tokens: int, prompt: int | None) -> str:
    whole = sorted(str(keep) for keep in keeps if keep.held(tokens, prompt) >= tokens)
    if not whole:
        return ""
    return f"{', '.join(whole)}: all of {tokens:,} tokens are held, so nothing is saved or lost"


def kind_of(plan: KVPlan) -> str:
    """``map`` for a sharing map, and else ``plan``: the key that names it."""
    return "plan" if plan.sharing_map is None else "map"
