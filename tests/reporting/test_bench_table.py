"""The sentence of `bench` about plans; that about maps is tested with the command."""

from kvsharer_exp.reporting.bench_table import where_from


def test_the_sentence_of_bench_adds_up() -> None:
    mebi = 2**20
    predicted = {
        "kv_fraction": 0.5,
        "kv_weight_bytes_saved": -mebi,
        "attention_read_bytes_per_step": {"full": 4 * mebi, "shared": 3 * mebi},
        "concatenation_bytes_per_step": {"full": 8 * mebi, "shared": 4 * mebi},
        "dequantisation_bytes_per_step": {"full": 0, "shared": 2 * mebi},
        "prefill_speedup": 1.25,
    }
    sentence = where_from({"batch": 1, "context": 64, "predicted": predicted})
    assert "moves 2.00 MiB less (the cache's copies -4.00, attention reads -1.00" in sentence
    assert "parameters +1.00, quantised KV written out +2.00)" in sentence
    assert "20.0% of its FLOPs" in sentence and "2.00 times" in sentence
