"""Copy the modules that run plans, as files for the folder of an export.

A model that runs under a plan needs the code of its actions wherever it is loaded. `shipped_code`
writes what `plan_files` returns. No second implementation exists: the files are this package's own
modules, starting at `planned_model`, and all that these import. `foreign_code` adds the modules of
other packages' actions.

transformers loads code from the files of one folder that import each other relatively. So the
module ``kvsharer_exp.model.stores.codes`` becomes ``kvplan_model_stores_codes.py``, and the imports
and the names of runners are rewritten to match. Nothing else is changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from importlib import resources

from kvsharer_exp.shipping.foreign_code import ForeignCode
from kvsharer_exp.values.actions.base import Action

REGISTRY = "kvsharer_exp.values.actions.registry"
MAIN, CONFIG = "kvsharer_exp.shipping.planned_model", "kvsharer_exp.shipping.exported_config"
PLAN_CODE, PLAN_CLASS = "modeling_kv_plan", "KVPlanForCausalLM"
_IMPORT = re.compile(r"^(\s*from )(kvsharer_exp\.[\w.]+)(?= import )", re.MULTILINE)
_RUNNER = re.compile(r'"(kvsharer_exp\.[\w.]+)(?=:\w+")')
_ORIGIN = "# A module of kvsharer_exp (Apache-2.0), copied by its command export.\n"


def plan_files(
    model_class: str, config_class: str, others: Collection[type[Action]] = ()
) -> dict[str, str]:
    """The files by name, for a model and a configuration of these classes of transformers.

    ``others`` are the actions of other packages that the plan has.

    Raises:
        InputError: the code of one of them cannot be copied (`ForeignCode`).
    """
    foreign = ForeignCode(others, _flat)
    files = {f"{_flat(name)}.py": _rewritten(name) for name in shipped_modules(*foreign.needed)}
    files |= foreign.files
    model, config = f"{PLAN_CODE}.py", f"{PLAN_CONFIG}.py"
    files[f"{_flat(REGISTRY)}.py"] += foreign.registered()
    files[model] += foreign.imported()
    return {
        **files,
        model: with_stock(files[model], "LlamaForCausalLM", model_class),
        config: with_stock(files[config], "LlamaConfig", config_class),
    }


def with_stock(text: str, ours: str, theirs: str) -> str:
    """``text`` of a file that builds on the class ``ours`` of transformers, built on ``theirs``."""
    line = f"from transformers import {ours} as "
    assert text.count(line) == 1
    return text.replace(line, line.replace(ours, theirs))


@cache
def shipped_modules(*more: str) -> tuple[str, ...]:
    """`planned_model` and every module of this package that it or ``more`` need, by full name."""
    found, waiting = {MAIN, *more}, [MAIN, *more]
    while waiting:
        text = _text(waiting.pop())
        needed = {name for _, name in _IMPORT.findall(text)} | set(_RUNNER.findall(text))
        waiting += sorted(needed - found)
        found |= needed
    return tuple(sorted(found))


def _text(module: str) -> str:
    package, _, name = module.rpartition(".")
    return (resources.files(package) / f"{name}.py").read_text(encoding="utf-8")


def _rewritten(module: str) -> str:
    text = _IMPORT.sub(lambda found: f"{found[1]}.{_flat(found[2])}", _text(module))
    return _ORIGIN + _RUNNER.sub(lambda found: f'".{_flat(found[1])}', text)


def _flat(module: str) -> str:
    """The name that ``module`` has in the folder of an export."""
    if module == MAIN:
        return PLAN_CODE
    return "kvplan_" + "_".join(module.split(".")[1:])


PLAN_CONFIG = _flat(CONFIG)
