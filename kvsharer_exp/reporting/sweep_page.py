"""Make the HTML page of a sweep: question, answer, front, pictures, and how to serve a map.

The command ``sweep`` draws the `pictures` and puts them on the `front_page`. The page needs no
network. It holds Plotly's library once (4.8 MB); all other pictures are PNG.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.reporting.answers import answer, most_shared
from kvsharer_exp.reporting.figures.front import front_figure, front_html
from kvsharer_exp.reporting.figures.maps import map_figure
from kvsharer_exp.reporting.figures.progress import progress_figure
from kvsharer_exp.reporting.figures.ranking import distance_heatmap
from kvsharer_exp.reporting.figures.style import save_png, spread
from kvsharer_exp.reporting.figures.tasks import tasks_figure
from kvsharer_exp.reporting.front_table import front_table
from kvsharer_exp.reporting.html import STYLE, embedded, table
from kvsharer_exp.reporting.sweep_result import SweepResult
from kvsharer_exp.values.score_names import CALIBRATION_PERPLEXITY, KL, table_columns
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry

_DRAWN = 8  # the most maps side by side in a picture


def pictures(sweep: SweepResult) -> dict[str, Any]:
    """Draw the figures of a sweep, by file name without its ending."""
    drawn = spread(sweep.shared, _DRAWN)
    label = sweep.score_label
    found = {
        "front": front_figure(sweep.results, sweep.front, title=sweep.title, **sweep.drawing),
        "progress": progress_figure(sweep.results, sweep.volumes, score_label=label),
        "tasks": tasks_figure(drawn, sweep.full_scores, _compared(sweep.full_scores)),
    }
    if drawn:
        maps = {_above(entry): SharingMap(entry.kv_source_layers) for entry in drawn}
        found["maps"] = map_figure(maps, f"{sweep.model}: maps of the front")
    return found


def _compared(full_scores: Mapping[str, float]) -> list[str]:
    left_out = (KL, CALIBRATION_PERPLEXITY)
    return [name for name in table_columns(full_scores) if name not in left_out]


def _above(entry: FrontEntry) -> str:
    kl = f"\nKL {entry.scores[KL]:.3g}" if KL in entry.scores else ""
    return f"{entry.num_shared}/{len(entry.kv_source_layers)} shared{kl}"


def front_page(sweep: SweepResult, pngs: Mapping[str, bytes]) -> str:
    """The page as HTML; ``pngs`` are the figures of `pictures` as PNG, by the same names."""
    header, *rows = front_table(sweep.entries, sweep.full_scores)
    sentences = answer(
        sweep.entries,
        sweep.full_scores,
        sweep.reference_maps,
        sweep.results,
        f"score ({sweep.fitness})",
    )
    heat = save_png(distance_heatmap(sweep.distances, f"{sweep.distance} between layers' mean KV"))
    compare = (
        f'<p><a href="{html.escape(sweep.compare_url)}">Compare the front in MLflow</a> '
        "(while <code>kvsharer ui</code> runs)</p>"
        if sweep.compare_url
        else ""
    )
    maps = ""
    if "maps" in pngs:
        maps = embedded(
            pngs["maps"],
            "Shaded layers keep their KV; a white one reads that of the layer its arc points to.",
        )
    title = html.escape(sweep.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="answer">{html.escape(sweep.headline)}</p>
{compare}
<h2>Asked</h2>
{table(["what", "value"], list(sweep.asked.items()))}
<h2>Found</h2>
<ul>{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>
<div class="wide">{table(header, rows)}</div>
<p>In brackets: what is retained of the full cache's score on the same items.</p>
{front_html(sweep.results, sweep.front, title="", **sweep.drawing)}
{embedded(pngs["tasks"], "Averages hide what a single task loses.")}
<h2>Maps</h2>
<p>One click selects a map.</p>
<div class="wide">{_maps_table(sweep.shared)}</div>
{maps}
<h2>Serve one</h2>
{_serving(sweep)}
<h2>How the search went</h2>
{embedded(pngs["progress"], "Best of each size, and the area under the front, by maps scored.")}
{embedded(heat, "What the search started from: how unlike the layers' mean keys and values are.")}
<h2>Environment and seeds</h2>
{table(["what", "value"], list(sweep.environment.items()))}
</body></html>
"""


def _maps_table(shared: Sequence[FrontEntry]) -> str:
    rows = [
        [
            str(entry.num_shared),
            str(SharingMap(entry.kv_source_layers)),
            ", ".join(engines(SharingMap(entry.kv_source_layers))),
            entry.digest,
        ]
        for entry in shared
    ]
    return table(["shared", "kv_source_layers", "can be served by", "digest"], rows, code=1)


def engines(sharing_map: SharingMap) -> list[str]:
    """Name the engines that can express the map.

    transformers (with this package) and vLLM let a target read any earlier layer of its attention
    type. SGLang and llama.cpp can only let the last layers read the last owner.
    """
    targets, layers = sharing_map.targets, sharing_map.num_layers
    last_owner = layers - len(targets) - 1
    trailing = all(sharing_map.kv_source_layers[i] == last_owner for i in targets)
    return ["transformers", "vLLM", *(["SGLang", "llama.cpp"] if trailing else [])]


def _serving(sweep: SweepResult) -> str:
    """Lines to copy for the map that `headline` names, or else for the map that shares least."""
    entry = most_shared(sweep.entries, 0.95) or next(iter(sweep.shared), None)
    if entry is None:
        return "<p>No map of the front shares a layer.</p>"
    sharing_map = SharingMap(entry.kv_source_layers)
    code = f"""from kvsharer_exp import SharingMap, load_model, share_kv

model, tokenizer = load_model({sweep.model!r})
sharing_map = SharingMap.parse("{sharing_map}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
with share_kv(model, sharing_map):
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""
    shell = f"kvsharer export model={sweep.model} map={sharing_map} export.path=shared_model"
    load = """from kvsharer_exp import load_exported

model, tokenizer = load_exported("shared_model")"""
    blocks = [f"<pre>{html.escape(text)}</pre>" for text in (code, shell, load)]
    return f"""<p>{entry.num_shared} of {sharing_map.num_layers} layers shared, in Python:</p>
{blocks[0]}<p>As a model folder without the weights that targets no longer need:</p>
{blocks[1]}{blocks[2]}
<p>vLLM expresses any of these maps: <code>Attention(…, kv_sharing_target_layer_name=…)</code> in
the model's code lets a layer read any earlier one of the same attention type. SGLang and llama.cpp
share trailing layers only: the last layers, reading the last one that keeps its KV.</p>"""
