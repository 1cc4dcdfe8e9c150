"""The command ``generate``: answers to a prompt, or to each prompt of a file.

The answers of the full cache and of the plan or map are shown side by side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from kvsharer_exp.cli.config.commands import GenerateConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.result_file import identify, tags_of
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.measure.benchmark import check_length
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten
from kvsharer_exp.values.text_files import read_text, why_unreadable


def run(config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, plans: Plans) -> None:
    """Write ``result.json`` with both answers to every prompt."""
    wanted = config.generate
    prompts = read_prompts(wanted)
    plan = plans.plan
    plans.check()
    encoded = [_encode(loaded, prompt, chat=wanted.chat) for prompt in prompts]
    for ids in encoded:
        longest = ids.shape[1] + wanted.max_new_tokens
        check_length(loaded.model, longest, "the prompt with generate.max_new_tokens")
    log.start(loaded.description, windows.texts, **tags_of(plan))
    fitted = plans.fitted
    plans.keep(fitted)
    for side in (None, fitted):  # warm-up
        _answer(loaded, side, encoded[0], 2)
    answers = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        both = _both(loaded, fitted, ids, wanted.max_new_tokens)
        answers.append({"prompt": prompt, **both})
        _show(log, answers[-1], "shared" if plan.sharing_map is not None else "plan")
    log.tracker.log_dict(log.run_id, {"answers": answers}, "answers.json")
    log.finish(
        {
            **identify(plan),
            "max_new_tokens": wanted.max_new_tokens,
            "chat": wanted.chat,
            "answers": answers,
        },
        then=next_command(config, "evaluate", plans.word),
    )


def read_prompts(wanted: GenerateConfig) -> list[str]:
    """The one prompt, or every line of the file that is not empty.

    Raises:
        InputError: neither is given, the prompt or the file is empty, or the file cannot be read.
    """
    if wanted.prompt is not None:
        if not wanted.prompt.strip():
            raise InputError("generate.prompt is empty: give some text to continue")
        return [wanted.prompt]
    if wanted.file is None:
        raise InputError(
            'no prompt given: generate.prompt="…" gives one, generate.file=… one a line'
        )
    try:
        text = read_text(Path(wanted.file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"generate.file={shorten(wanted.file)} cannot be read ({why_unreadable(error)}): "
            "give a text file with one prompt a line"
        ) from error
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"generate.file={shorten(wanted.file)} is empty: give one prompt a line")
    return prompts


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The index of the first new token at which two answers differ; None if they are the same."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _encode(loaded: LoadedModel, prompt: str, *, chat: bool) -> torch.Tensor:
    """Return the token ids of the prompt, (1, tokens), on the device of the model."""
    tokenizer = loaded.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"generate.chat=true, but the tokenizer of {loaded.name} has no chat "
                "template: leave it out"
            )
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if not chat and loaded.adds_bos:
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor([ids], device=loaded.model.get_input_embeddings().weight.device)


def _both(loaded: LoadedModel, fitted: FittedPlan, ids: torch.Tensor, most: int) -> dict[str, Any]:
    full = _answer(loaded, None, ids, most)
    shared = _answer(loaded, fitted, ids, most)
    return {
        "prompt_tokens": ids.shape[1],
        "full": full,
        "shared": shared,
        "first_diverging_token": first_divergence(full["tokens"], shared["tokens"]),
    }


def _answer(
    loaded: LoadedModel, fitted: FittedPlan | None, ids: torch.Tensor, most: int
) -> dict[str, Any]:
    """Answer greedily, with the full cache if no plan is given.

    ``tokens_per_second`` counts the whole call, the prefill included.
    """
    model, tokenizer, cuda = loaded.model, loaded.tokenizer, ids.is_cuda
    with nullcontext() if fitted is None else apply_plan(model, fitted):
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        "kv_bytes": cache_bytes(output.past_key_values),
    }


def _show(log: RunLog, answer: dict[str, Any], changed: str) -> None:
    log.console.print(Text(f"\n> {answer['prompt']}", style="bold"))
    table = Table("", show_lines=True)
    for side in ("full", changed):
        table.add_column(side, overflow="fold")
    full, shared, differs = answer["full"], answer["shared"], answer["first_diverging_token"]
    table.add_row("answer", Text(full["text"]), Text(shared["text"]))
    table.add_row("tokens/s", *(f"{side['tokens_per_second']:.1f}" for side in (full, shared)))
    table.add_row("KV bytes", *(f"{side['kv_bytes']:,}" for side in (full, shared)))
    log.console.print(table)
    log.console.print(
        f"the same {len(full['tokens'])} tokens"
        if differs is None
        else f"first different token: number {differs} (from 0) of {len(full['tokens'])}"
    )
