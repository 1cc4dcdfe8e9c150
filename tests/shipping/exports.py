"""Exports of the tiny models, and the two ways of loading one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from kvsharer_exp import load_exported
from kvsharer_exp.shipping.export import write_export
from tests.model.actions.plans import PLANS, fitted
from tests.tiny import some_map, tiny_model


def theirs(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def ours(folder: Path) -> PreTrainedModel:
    return load_exported(folder)[0]


WAYS: dict[str, Callable[[Path], PreTrainedModel]] = {"theirs": theirs, "ours": ours}


def export(name: str, tokenizer: Any, path: Path) -> Path:
    model = copy.deepcopy(tiny_model(name))
    write_export(model, tokenizer, some_map(model, 2), path, card="# card\n")
    return path


def export_plan(name: str, plan: str, tokenizer: Any, path: Path) -> Path:
    """``plan`` is a name of `PLANS`."""
    model, wanted = tiny_model(name), fitted(tiny_model(name), PLANS[plan])
    write_export(copy.deepcopy(model), tokenizer, wanted, path, card="# card\n")
    return path
