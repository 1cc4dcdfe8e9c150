"""What scoring a map costs: against the layers it must run, against the plain way, by depth.

    python tests/benchmarks/evaluator.py [--model smollm2] [--dtype float32]

- *cost*: seconds of a scored candidate over the seconds its blocks and the head took inside that
  very call (forward hooks), for maps that change from an early, a middle and a late layer on.
- *greedy*: the paper's walk through the evaluator against the plain algorithm, sentence by
  sentence through the whole model, the full cache's pass included; both must decide alike. Also
  with every window scored, where the evaluator would stop as soon as the test is decided.
- *depth*: seconds per candidate of ranking and greedy on random models of 12 to 80 layers, over
  those of 12 layers; bytes kept against the budget.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from kvsharer_exp.measure.machine import settle

settle()

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.windows import token_windows
from kvsharer_exp.measure.calibration import layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.ranking import distance_matrix, rank
from kvsharer_exp.model.load import load_model
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.search.paper.greedy import CUTS, Advance, greedy
from kvsharer_exp.values.ranking import LayerPair
from kvsharer_exp.values.scores import Accept, CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap

RATIOS = [0.125, 0.25, 0.375]


def cost(model: Any, evaluator: Evaluator, first: int, repeats: int = 5) -> tuple[float, float]:
    """(seconds of a candidate that changes layer ``first``, over those of its layers and head)."""
    modules = [layer.block for layer in attention_layers(model)[first:]]
    modules.append(model.get_output_embeddings())
    inside, began = [0.0], [0.0]

    def enter(*_: Any) -> None:
        began[0] = time.perf_counter()

    def leave(*_: Any) -> None:
        inside[0] += time.perf_counter() - began[0]

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    sharing_map = SharingMap.identity(evaluator.num_layers).share(first, 0)
    totals, ratios = [], []
    for _ in range(repeats + 1):
        evaluator.reset()
        inside[0], started = 0.0, time.perf_counter()
        evaluator.score(sharing_map)
        totals.append(time.perf_counter() - started)
        ratios.append(totals[-1] / inside[0])
    for handle in handles:
        handle.remove()
    return median(totals[1:]), median(ratios[1:])  # the first one warms up


@torch.inference_mode()
def plain_advance(model: Any, windows: torch.Tensor) -> Advance:
    """The authors' way: every sentence by itself through the whole model, for every candidate."""

    def hidden(sentence: torch.Tensor) -> torch.Tensor:
        output = model(sentence[None], use_cache=False, output_hidden_states=True)
        return output.hidden_states[-1].float().flatten()

    full = [hidden(sentence) for sentence in windows]

    @torch.inference_mode()
    def advance(sharing_map: SharingMap, accept: Accept) -> tuple[CandidateScores, bool]:
        with share_kv(model, sharing_map):
            cosines = [
                nn.functional.cosine_similarity(hidden(sentence), reference, dim=0).item()
                for sentence, reference in zip(windows, full, strict=True)
            ]
        scores = CandidateScores(tuple(cosines))
        return scores, bool(accept(scores, 0))

    return advance


def ranked(model: Any, windows: torch.Tensor) -> tuple[LayerPair, ...]:
    matrix = distance_matrix(model, layer_means(model, windows), distance="euclidean_flat")
    return rank(matrix, model_id="", distance="euclidean_flat").pairs


def greedy_against_plain(model: Any, windows: torch.Tensor) -> None:
    pairs, layers = ranked(model, windows), len(attention_layers(model))
    walks = []
    for make, all_windows in (
        (lambda: Evaluator(model, windows, cuts=CUTS).advance, False),
        (lambda: Evaluator(model, windows).advance, True),
        (lambda: plain_advance(model, windows), True),
    ):
        started = time.perf_counter()
        found = greedy(pairs, layers, RATIOS, advance=make(), all_windows=all_windows)[-1]
        walks.append((found, time.perf_counter() - started))
    plain, plain_seconds = walks[-1]
    for name, (found, seconds) in zip(("evaluator", "on all windows"), walks, strict=False):
        steps = list(zip(found.trace, plain.trace, strict=True))
        assert all(a.accepted == b.accepted for a, b in steps), "the two ways decide differently"
        seen = sum(a.windows for a, _ in steps) / sum(b.windows for _, b in steps)
        furthest = max(
            (abs(a.cosine - b.cosine) for a, b in steps if a.windows == b.windows), default=0.0
        )
        print(
            f"greedy, {name}: {found.candidates} candidates on {seen:.0%} of the windows in "
            f"{seconds:.1f} s, plain {plain_seconds:.1f} s: {plain_seconds / seconds:.1f} times "
            f"faster; cosines within {furthest:.1e}"
        )


def depth(budget: int = 64 << 20) -> None:
    first = None
    for layers in (12, 20, 40, 80):
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        windows = torch.randint(256, (16, 64))
        started = time.perf_counter()
        pairs = ranked(model, windows)
        evaluator = Evaluator(model, windows, memory_budget=budget)
        found = greedy(pairs, layers, RATIOS, advance=evaluator.advance)[-1]
        each = (time.perf_counter() - started) / found.candidates
        first = first or each / layers
        print(
            f"depth {layers}: {found.candidates} candidates, {each * 1e3:.0f} ms each, "
            f"{each / layers / first:.2f} of linear; kept {evaluator.kept_bytes / 2**20:.0f} MiB "
            f"of {budget >> 20}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    windows = token_windows(
        split_texts().calibration, tokenizer, num_windows=30, window_tokens=64, seed=0
    )
    evaluator = Evaluator(model, windows)
    for layer in (1, evaluator.num_layers // 2, evaluator.num_layers - 3):
        seconds, ratio = cost(model, evaluator, layer)
        print(f"cost: from layer {layer} on {seconds:.2f} s, {ratio:.3f} of its layers and head")
    del evaluator
    greedy_against_plain(model, windows)
    depth()


if __name__ == "__main__":
    main()
