"""Public fault 1, the study: a map that overflows fails with its reason, and the others go on."""

import json
import math
from pathlib import Path

import pytest
from torch import nn

from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import loaded_model
from kvsharer_exp.search.finals import race
from kvsharer_exp.search.front import best_within, hypervolume, is_beaten
from kvsharer_exp.values.finite import NotFiniteError
from tests.cli.commands.test_commands import QUICK
from tests.search.test_front import result

LAYER = 3


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, whose layer 3 overflows wherever it reads another layer's KV."""
    load = loaded_model.load

    def load_broken(spec):
        model, tokenizer = load(spec)
        block = model.model.layers[LAYER]

        def overflow(module, args, output):
            if not isinstance(block.self_attn.k_proj, nn.Linear):
                (output[0] if isinstance(output, tuple) else output).fill_(math.inf)
            return output

        block.register_forward_hook(overflow)
        return model, tokenizer

    monkeypatch.setattr(loaded_model, "load", load_broken)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.slow
def test_a_sweep_keeps_the_reason_and_goes_on(
    overflowing, together: int, tmp_path: Path, store: list[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*QUICK, *store, "study.n_trials=12", "sampler=random", "study.margin=9"]
    words += [f"scoring.maps_per_forward={together}", f"study.name=overflow-{together}"]
    words += ["hydra.run.dir=run", "calibration.distance=cosine", "scoring.report.tasks=[]"]
    assert main(["sweep", *words, "scoring.search.tasks=[]", "--quiet"]) == 0
    found = json.loads(Path("run/result.json").read_text())
    assert found["trials"]["failed"] > 0
    assert found["trials"]["complete"] > 0
    assert all(entry["kv_source_layers"][LAYER] == LAYER for entry in found["front"])


def test_what_overflows_in_the_finals_leaves_them() -> None:
    maps = [result(0, 0.5, -1.0), result(1, 0.5, -1.1)]

    def batch(one):
        if one.number == 0:
            raise NotFiniteError("NaN in window 0")
        return [0.5, 0.5]

    assert race(maps, [batch], lambda: False) == {1: (0.5, 0.5)}


def test_comparisons_of_maps_do_not_meet_nan() -> None:
    odd, good = result(0, 0.2, math.nan), result(1, 0.5, -1.0)
    assert best_within([odd, good], 1.0) == good
    assert not is_beaten(good, [odd, good])
    points = [(0.5, 1.0), (0.2, math.nan), (math.nan, 2.0), (0.1, math.inf)]
    assert hypervolume(points, (1.0, 0.0)) == 0.5
