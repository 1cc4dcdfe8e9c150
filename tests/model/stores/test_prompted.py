"""Keeps that choose tokens of a prompt: as their definitions say, whatever the cut of the text."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.model.stores.registry import make_store
from kvsharer_exp.model.stores.weights import Queries
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.plan import KVPlan
from tests.model.stores.plain import Heavy, snap_positions
from tests.tiny import tiny_model, tokens

CPU = torch.device("cpu")
HEADS, GROUP, DIM, SCALING = 2, 2, 8, 0.5


class Case:
    """A random text of some rows, with its padding, its prompt and its cut into forwards."""

    def __init__(self, draw: torch.Generator) -> None:
        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=draw))

        self.number = number
        # At least five tokens are to be chosen from: fewer would tie, for SnapKV smooths over five.
        self.end, self.total = number(12, 18), number(19, 26)
        # The text of the last row begins when the prompt has ended.
        self.pads = [0, number(0, 3), number(0, 3), number(self.end, self.total - 1)]
        shape = (4, HEADS, self.total, DIM)
        self.keys = torch.randn(shape, generator=draw, dtype=torch.float64)
        shape = (4, HEADS * GROUP, self.total, DIM)
        self.queries = torch.randn(shape, generator=draw, dtype=torch.float64) * 2
        tags = torch.arange(self.total, dtype=torch.float64)
        self.values = tags[None, None, :, None].expand(4, HEADS, self.total, DIM)

    def run(self, keep: Keep, *, cached: bool) -> dict[tuple[int, int, int], list[int]]:
        """What each row, KV head and token after the prompt reads."""
        store = make_store(Own(keep=keep), lasting=cached, prompt=self.end)
        read, seen = {}, 0
        while seen < self.total:
            count = min(self.number(1, 9), self.total - seen) if cached else self.total
            part = slice(seen, seen + count)
            # The mask of a forward tells of no padding that is still to come.
            pads = torch.tensor(self.pads).clamp(max=seen + count)
            columns = store.prepare(count, pads, CPU)
            keys, values = store.update(self.keys[:, :, part], self.values[:, :, part])
            other = store.watch(Queries(self.queries[:, :, part], SCALING), keys, values)
            if other is not None:
                keys, values, columns = other
            for row, pad in enumerate(self.pads):
                for head in range(HEADS):
                    for token in range(max(self.end, pad, seen), seen + count):
                        shown = values[row, head, :, 0].int()
                        if columns is None:
                            mine = [t for t in shown.tolist() if pad <= t <= token]
                        else:
                            visible = columns.visible()
                            visible = visible[row % len(visible)]
                            visible = visible[head * GROUP % len(visible), token - seen]
                            index = columns.index[row % len(columns.index)]
                            mine = shown[visible & (index >= pad) & (index <= token)].tolist()
                        read[row, head, token] = mine
            seen += count
        return read

    def plain(self, keep: Keep) -> dict[tuple[int, int, int], list[int]]:
        read = {}
        for row, pad in enumerate(self.pads):
            for head in range(HEADS):
                keys = self.keys[row, head, pad:]
                queries = self.queries[row, head * GROUP : (head + 1) * GROUP, pad:]
                end = max(0, self.end - pad)
                if isinstance(keep, SnapKV):
                    number = keep.chosen(end)
                    kept = snap_positions(
                        queries, keys[:end], SCALING, number, min(keep.observe, number)
                    )
                    steps = [[*kept, *range(end, t + 1)] for t in range(end, len(keys))]
                else:
                    assert isinstance(keep, H2O)
                    heavy = Heavy(keep.most(end))
                    heavy.prompt(queries, keys[:end], SCALING)
                    steps = [
                        heavy.step(queries[:, t], keys[: t + 1], SCALING)
                        for t in range(end, len(keys))
                    ]
                for step, tokens_read in enumerate(steps):
                    read[row, head, pad + end + step] = [t + pad for t in tokens_read]
        return read


def random_keep(case: Case, kind: str) -> Keep:
    fraction = case.number(1, 9) / 10 if case.number(0, 2) == 0 else None
    if kind == "h2o":
        return H2O(fraction or case.number(2, 14))
    observe = case.number(1, 4)
    return SnapKV(fraction or observe + case.number(0, 8), observe)


@pytest.mark.parametrize("kind", ["snapkv", "h2o"])
def test_what_is_read_equals_the_definition(kind: str) -> None:
    """Two hundred random keeps, texts, paddings, prompts and cuts; without a cache too."""
    draw = torch.Generator().manual_seed(1)
    some_went = 0
    for _ in range(200):
        case = Case(draw)
        keep = random_keep(case, kind)
        expected = case.plain(keep)
        assert case.run(keep, cached=True) == expected, keep
        assert case.run(keep, cached=False) == expected, keep
        some_went += any(len(read) < token for (_, _, token), read in expected.items())
    assert some_went > 150


class PlainAttention:
    """An attention function that reads token by token what the definitions say."""

    def __init__(self, plan: KVPlan, end: int) -> None:
        self.plan, self.end = plan, end
        self.kept: dict[tuple[int, int, int], list[int] | Heavy] = {}
        self.now: dict[tuple[int, int, int], list[int]] = {}

    def __call__(self, module, query, key, value, attention_mask, scaling, **options):
        output = torch.zeros_like(query)
        group = query.shape[1] // key.shape[1]
        source = self.plan.key_sources[module.layer_idx]
        for row in range(len(key)):
            for head in range(key.shape[1]):
                mine = slice(head * group, (head + 1) * group)
                states, keys = query[row, mine], key[row, head]
                place = (source, row, head)
                if query.shape[2] > 1:
                    assert query.shape[2] == len(keys) == self.end
                    self._end_prompt(place, states, keys, scaling, module.layer_idx)
                for step in range(query.shape[2]):
                    token = len(keys) - query.shape[2] + step
                    read = list(range(token + 1))
                    if token >= self.end:
                        read = self._step(place, states[:, step], keys, scaling, module.layer_idx)
                    weights = (states[:, step] @ keys[read].T * scaling).softmax(-1)
                    output[row, mine, step] = weights @ value[row, head, read]
        return output.transpose(1, 2).contiguous(), None

    def _end_prompt(self, place, states, keys, scaling, layer) -> None:
        action = self.plan.actions[place[0]]
        if layer != place[0] or action.keep is None:
            return
        if isinstance(action.keep, H2O):
            self.kept[place] = heavy = Heavy(action.keep.most(self.end))
            heavy.prompt(states, keys, scaling)
        else:
            number = action.keep.chosen(self.end)
            observe = min(action.keep.observe, number)
            self.kept[place] = snap_positions(states, keys, scaling, number, observe)

    def _step(self, place, states, keys, scaling, layer) -> list[int]:
        kept = self.kept.get(place)
        if kept is None:
            return list(range(len(keys)))
        if isinstance(kept, list):
            return [*kept, *range(self.end, len(keys))]
        if layer == place[0]:
            self.now[place] = kept.step(states, keys, scaling)
        return self.now[place]


TEXTS = ["0snap6+2_1h7_0_1_4h0.5_5snap0.4+3", "0h4_1snap3+3_2_1_0_5h2", "0snap99+4_1h99_0_1_4_5h7"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_logits_equal_a_plain_attention_token_by_token(kind: str, text: str) -> None:
    model, plan, end = tiny_model(kind), KVPlan.parse(text), 12
    ids = tokens(2, 20)
    plain = PlainAttention(plan, end)
    AttentionInterface.register("plain", plain)
    before = model.config._attn_implementation
    map_alone = KVPlan(tuple(a if isinstance(a, Read) else Own() for a in plan.actions))
    with torch.inference_mode():
        model.config._attn_implementation = "plain"
        try:
            with apply_plan(model, map_alone):
                expected = stepwise(model, ids, end)
        finally:
            model.config._attn_implementation = before
        with apply_plan(model, plan):
            found = stepwise(model, ids, end)
        with apply_plan(model, plan, prompt=end):
            one_shot = model(ids, use_cache=False).logits
        stock = model(ids).logits
    close = 1e-9 if model.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
    torch.testing.assert_close(one_shot, expected, rtol=0, atol=close)
    assert (stock - expected)[:, end:].abs().max() > 1e-3


def stepwise(model: PreTrainedModel, ids: torch.Tensor, end: int) -> torch.Tensor:
    """The logits of a prompt of ``end`` tokens and of the tokens after it, one by one."""
    cache = DynamicCache(config=model.config)
    parts = ids.split([end, *[1] * (ids.shape[1] - end)], dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("text", ["0_1snap6+2_2_3_0_1", "0_1h3_2_3h4_0_1"])
def test_a_row_that_begins_after_the_prompt_reads_its_own_tokens_only(text: str) -> None:
    model, plan, end, pad = tiny_model("llama"), KVPlan.parse(text), 12, 14
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode(), apply_plan(model, plan, prompt=end):
        known = {"attention_mask": mask, "position_ids": positions}
        one_shot = model(ids, use_cache=False, **known).logits
        cache, parts = DynamicCache(config=model.config), []
        for first, last in ((0, 5), (5, 12), (12, 13), (13, 17), (17, 18), (18, 20)):
            known = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            parts.append(model(ids[:, first:last], past_key_values=cache, **known).logits)
    with torch.inference_mode(), apply_plan(model, plan, prompt=1):
        alone = stepwise(model, ids[1:, pad:], 1)[0]
    for logits in (one_shot, torch.cat(parts, 1)):
        torch.testing.assert_close(logits[1, pad:], alone, rtol=0, atol=1e-9)
