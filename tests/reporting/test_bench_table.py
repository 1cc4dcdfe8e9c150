"""The table and the closing words of `bench` tell gains and losses alike, of maps and of plans."""

from typing import Any

import pytest

from kvsharer_exp.reporting.bench_table import cells_table, where_from

MEBI = 2**20


def cell(prefill_speedup: float = 1.25) -> dict[str, Any]:
    """A plan with half the KV that decodes at 0.4 times the rate, and prefills at twice it."""

    def side(halves: int, seconds: float, rate: float) -> dict[str, Any]:
        spread = {"prefill_seconds": seconds, "decode_tokens_per_second": rate}
        values = {name: dict.fromkeys(("median", "min", "max"), x) for name, x in spread.items()}
        return {"cache_bytes": halves * MEBI, "resident_bytes": {"median": MEBI}, **values}

    predicted = {
        "kv_fraction": 0.5,
        "kv_weight_bytes_saved": -MEBI,
        "attention_read_bytes_per_step": {"full": 4 * MEBI, "shared": 3 * MEBI},
        "concatenation_bytes_per_step": {"full": 8 * MEBI, "shared": 4 * MEBI},
        "dequantisation_bytes_per_step": {"full": 0, "shared": 2 * MEBI},
        "prefill_speedup": prefill_speedup,
        "decode_speedup": 1.6,
    }
    sides = {"full": side(2, 0.5, 10.0), "shared": side(1, 0.25, 4.0)}
    speedup = {"prefill": 2.0, "decode": 0.4}
    return {"batch": 1, "context": 64, **sides, "speedup": speedup, "predicted": predicted}


@pytest.mark.parametrize("kind", ["map", "plan"])
def test_ratios_stand_below_what_they_are_ratios_of(kind: str) -> None:
    head, full, changed, ratios, predicted = cells_table([cell()], kind)
    assert (full[1], changed[1], ratios[1], predicted[1]) == (
        "full",
        kind,
        f"{kind}/full",
        "predicted",
    )
    shown = [head.index(name) for name in ("cache", "prefill s", "tokens/s")]
    assert [ratios[column] for column in shown] == ["×0.500", "×0.500", "×0.400"]
    assert [predicted[column] for column in shown] == ["×0.500", "×0.800", "×1.600"]


def test_the_sentence_of_bench_adds_up_and_tells_a_loss() -> None:
    sentence = where_from(cell(), "plan")
    assert (
        "the plan decodes at 0.40 times the rate of the full cache and prefills at 2.00" in sentence
    )
    assert "moves 2.00 MiB less (DynamicCache's concatenation copies -4.00, attention" in sentence
    assert "reads -1.00, parameters +1.00, quantised KV written out +2.00)" in sentence
    assert "20.0% fewer FLOPs" in sentence and "2.00 times" in sentence
    assert "25.0% more FLOPs" in where_from(cell(prefill_speedup=0.8), "plan")
