"""What counts as the same answer, and how many KV blocks a plan leaves, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsharer_exp.shipping.vllm.blocks import page_bytes, predicted_blocks
from kvsharer_exp.shipping.vllm.check import TokenCheck, check_answers, compare, ulps_apart
from kvsharer_exp.shipping.vllm.client import CacheReport
from kvsharer_exp.shipping.vllm.folder import ExportFolder
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from tests.shipping.exports import export, export_plan

GIB = 2**30


class Told:
    """A model whose logits after token t are row t of ``table``."""

    device = "cpu"

    def __init__(
        self, table: list[list[float]], dtype: torch.dtype, noise: tuple[float, ...] = (0.0,)
    ) -> None:
        self.table, self.dtype = torch.tensor(table, dtype=dtype), dtype
        self.noise = torch.tensor(noise, dtype=dtype)

    def __call__(self, ids: torch.Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
        logits = self.table[ids]
        if past_key_values is not None:
            logits = logits + self.noise
        return type("Output", (), {"logits": logits, "past_key_values": ()})


def checked(table: list[list[float]], answers: list[list[int]], dtype=torch.float32) -> TokenCheck:
    return compare(Told(table, dtype), [[0]] * len(answers), answers)


STEPS = [[0.0, 9, 1], [0, 1, 9], [9, 0, 1]]  # the best answer to 0 is 1, 2, 0, 1, 2, …


def test_equal_tokens_pass() -> None:
    found = checked(STEPS, [[1, 2, 0], [1, 2, 0]])
    assert (found.positions, found.equal, found.passes, found.problem) == (6, 6, True, "")
    assert found.first_difference is None


def test_one_token_fails_in_float32_and_the_rest_is_compared_after_it() -> None:
    found = checked(STEPS, [[1, 2, 0], [1, 1, 2]])
    assert (found.positions, found.equal, len(found.wrong)) == (6, 5, 1)
    assert not found.passes
    first = found.first_difference
    assert first is not None
    assert (first.prompt, first.position, first.engine, first.reference) == (1, 1, 1, 2)
    assert first.gap == 8 and first.ulps is None
    assert "1 of 6 tokens differ, prompt 1, token 1: engine 1, reference 2" in found.problem
    assert TokenCheck.from_json(found.to_json()) == found


def test_a_near_tie_is_wrong_in_float32() -> None:
    almost = [[0.0, 1.0, 1.0 - 1e-6]] * 3
    assert not checked(almost, [[2]]).passes


@pytest.mark.parametrize(
    ("gap", "accepted"), [(0.0, True), (2 * 2**-7, True), (3 * 2**-7, False), (1.0, False)]
)
def test_bfloat16_may_rank_two_ulps_either_way(gap: float, accepted: bool) -> None:
    """Between 1 and 2 numbers of bfloat16 are 2**-7 apart."""
    table = [[0.0, 1.5 + gap if gap < 0.4 else 2.5, 1.5]] * 3
    answers = [[1] * 99 + [2]] if gap else [[1] * 100]
    found = checked(table, answers, torch.bfloat16)
    assert found.passes is accepted
    assert len(found.ties) == (1 if accepted and gap else 0)


def test_more_than_a_hundredth_of_ties_fails() -> None:
    table = [[0.0, 1.5 + 2**-7, 1.5]] * 3
    assert checked(table, [[1] * 198 + [2, 2]], torch.bfloat16).passes
    found = checked(table, [[1] * 197 + [2, 2, 2]], torch.bfloat16)
    assert not found.passes and not found.wrong
    assert "3 ties at 200 tokens are more than 2, prompt 0, token 197" in found.problem


def test_a_reference_that_differs_from_itself_may_differ_from_the_engine_too() -> None:
    """Here it does at every token after the first, by four units of the last place."""
    gap = 4 * 2**-7
    noisy = Told([[0.0, 1.5 + gap, 1.5]] * 3, torch.bfloat16, noise=(0, -2 * gap, 0))
    found = compare(noisy, [[0]], [[2] * 10 + [1] * 90])
    assert (found.own, len(found.ties), found.wrong) == (99, 10, ())
    assert found.passes
    further = Told([[0.0, 1.5 + gap, 1.25]] * 3, torch.bfloat16, noise=(0, -2 * gap, 0.25))
    assert len(compare(further, [[0]], [[0] + [1] * 99]).wrong) == 1  # 0 is far from the best


@pytest.mark.parametrize(
    ("one", "other", "dtype", "apart"),
    [
        (1.0, 1.0 + 2**-7, "bfloat16", 1),
        (16.0, 16.25, "bfloat16", 2),
        (-16.0, -16.25, "bfloat16", 2),
        (1.0, 1.0 + 2**-10, "float16", 1),
        (0.0, 0.0, "bfloat16", 0),
        (1.0, 2.0, "float32", None),
    ],
)
def test_ulps(one: float, other: float, dtype: str, apart: float | None) -> None:
    assert ulps_apart(one, other, dtype) == apart


def test_the_reference_is_the_export_in_the_asked_dtype(tokenizer, tmp_path: Path) -> None:
    folder = export("llama", tokenizer, tmp_path / "export")
    found = check_answers(folder, "bfloat16", [[5, 6]], [[7, 8, 9]])
    assert (found.dtype, found.positions) == ("bfloat16", 3)


PAGE = page_bytes(block_size=128, num_key_value_heads=3, head_dim=64, element_bytes=2)


def test_one_type_of_attention_costs_a_page_an_owner() -> None:
    """182 and 210 blocks are what vLLM 0.32 reported for SmolLM2 in half a GiB."""
    assert PAGE == 98304
    for owners, blocks in ((30, 182), (26, 210)):
        found = predicted_blocks(
            [None] * owners, memory_bytes=GIB // 2, block_size=128, page_bytes=PAGE
        )
        assert (found.num_blocks, found.padding) == (blocks, 0)
        assert found.bytes_per_block == owners * PAGE
        assert found.request_bytes(129) == 2 * owners * PAGE


@pytest.mark.parametrize(
    ("full", "sliding", "group_layers", "num_groups", "padding"),
    [
        (3, 15, 3, 6, 0),  # Gemma 3 270M
        (3, 14, 3, 6, 1),  # one sliding layer less saves nothing
        (2, 15, 2, 9, 1),
        (12, 13, 13, 2, 1),  # nearly as many of each: the larger number
        (12, 18, 12, 3, 6),  # 1.5 times as many is no longer nearly
        (0, 4, 4, 1, 0),
    ],
)
def test_two_types_are_grouped_as_vllm_does(
    full: int, sliding: int, group_layers: int, num_groups: int, padding: int
) -> None:
    windows = [None] * full + [512] * sliding
    found = predicted_blocks(windows, memory_bytes=GIB, block_size=16, page_bytes=1000)
    assert found.num_blocks == GIB // (group_layers * 1000)
    assert (found.group_layers, found.padding) == (group_layers, padding)
    assert len(found.group_windows) == num_groups


def test_a_window_is_held_from_the_middle_of_a_block() -> None:
    found = predicted_blocks([32], memory_bytes=GIB, block_size=16, page_bytes=10)
    assert [found.request_bytes(tokens) for tokens in (16, 32, 33, 1000)] == [10, 20, 30, 30]


def test_three_kinds_of_attention_are_refused() -> None:
    with pytest.raises(InputError, match="3 kinds of attention own KV: give a plan"):
        predicted_blocks([None, 8, 9], memory_bytes=1, block_size=1, page_bytes=1)


def blocks(folder: Path, reported: int = 0, tokens: int = 256) -> Any:
    report = CacheReport(reported, block_size=16, num_tokens=0)
    return ExportFolder.read(folder).check_blocks(
        report, memory_bytes=10**6, dtype="float32", request_tokens=tokens
    )


def test_an_export_says_what_its_blocks_cost(tokenizer, tmp_path: Path) -> None:
    found = blocks(export("llama", tokenizer, tmp_path / "export"), reported=61)
    page = 2 * 16 * 2 * 16 * 4
    assert (found.predicted.page_bytes, found.predicted.group_layers) == (page, 4)
    assert found.predicted.num_blocks == 10**6 // (4 * page) == 61
    assert found.full.num_blocks == 10**6 // (6 * page)
    assert found.passes and found.saves
    assert not blocks(tmp_path / "export", reported=60).passes


def test_a_hybrid_may_save_nothing() -> None:
    """Gemma 3 270M has 15 sliding layers and 3 full ones: six groups of three. With 14 or 13
    sliding owners there are still six."""
    windows = (512, 512, 512, 512, 512, None) * 3

    def saves(*targets: int) -> bool:
        sources = [layer - (layer in targets) for layer in range(18)]
        plan = KVPlan.parse("_".join(map(str, sources)))
        folder = ExportFolder(Path(), plan, "bfloat16", 1, 256, windows, 8192)
        report = CacheReport(0, block_size=128, num_tokens=0)
        return folder.check_blocks(
            report, memory_bytes=GIB, dtype="bfloat16", request_tokens=8192
        ).saves

    assert not saves(1)
    assert not saves(1, 3)
    assert saves(1, 3, 7)


def test_windows_are_those_of_the_layers(tokenizer, tmp_path: Path) -> None:
    folder = export("gemma3_text", tokenizer, tmp_path / "export")
    assert ExportFolder.read(folder).windows == (8, None) * 3


def test_a_source_that_was_changed_after_the_export_is_refused(tokenizer, tmp_path: Path) -> None:
    folder = export("llama", tokenizer, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    target = next(i for i, s in enumerate(config["kv_source_layers"]) if s not in (i, 1))
    before = config["kv_source_layers"][target]
    config["kv_source_layers"][target] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        ExportFolder.read(folder)
    assert f"layer {target} is 1 in config.json" in str(caught.value)
    assert f"but was exported as {before}, see sharing_map.json" in str(caught.value)


def test_what_vllm_cannot_do_is_refused_before_anything_starts(tokenizer, tmp_path: Path) -> None:
    folder = export_plan("llama", "quantised", tokenizer, tmp_path / "export")
    with pytest.raises(InputError, match=r"layer \d cannot keep .* bits in vLLM"):
        ExportFolder.read(folder)
