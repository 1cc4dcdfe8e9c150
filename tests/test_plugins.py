"""Another package adds a space and a sampler; a broken one is named (spaces: test_spaces.py)."""

import importlib
import inspect
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import save_file

from kvsharer_exp import extend, load_exported
from kvsharer_exp.cli.main import main
from kvsharer_exp.measure.fits import fit_plan
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.search import samplers
from kvsharer_exp.search.samplers import SAMPLERS, make_sampler
from kvsharer_exp.search.spaces.registry import make_space
from kvsharer_exp.shipping.foreign_code import ForeignCode
from kvsharer_exp.shipping.plan_code import plan_files
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.registry import action_classes
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plugins import find_part
from kvsharer_exp.values.sharing_map import SharingMap
from tests.cli.commands.test_commands import QUICK
from tests.refusals import WAY_OUT
from tests.search.test_spaces import LINE, check_encoded
from tests.tiny import tiny_model, tokens

EXAMPLE = Path(__file__).parent / "plugin_example"
PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]


def metadata(folder: Path, name: str, entries: dict[str, dict[str, str]]) -> None:
    """What an installer writes beside a package: its name and its entry points by group."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        line
        for group, parts in entries.items()
        for line in (f"[{group}]", *[f"{part} = {value}" for part, value in parts.items()])
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example package as if installed: importable, its entry points those of its pyproject."""
    metadata(tmp_path / "site", PROJECT["name"], PROJECT["entry-points"])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(EXAMPLE))


def test_the_space_of_the_example(example) -> None:
    space = make_space("window", LINE, max_shared=3)
    decoded = space.decode({"first": 4, "length": 2})
    assert decoded == SharingMap.identity(8).share(4, 3).share(5, 3)
    assert check_encoded(space, decoded)
    assert space.encode(SharingMap.identity(8).share(2, 1).share(5, 1)) is None


def test_the_sampler_of_the_example(example) -> None:
    space = make_space("window", LINE, max_shared=3)
    study = optuna.create_study(sampler=make_sampler("front_mix", space=space, seed=0, anew=0))
    first = study.ask(space.distributions())
    study.tell(first, 1.0)
    assert study.ask(space.distributions()).params == first.params
    with pytest.raises(InputError, match="sampler front_mix does not take these options"):
        make_sampler("front_mix", space=space, seed=0, elites=4)
    with pytest.raises(InputError, match=r"sampler\.kind=frontmix is unknown: did you mean front_"):
        make_sampler("frontmix", space=space, seed=0)


@pytest.fixture
def action(example) -> Iterator[None]:
    """The example's action as if installed; actions are looked up once in a process."""
    action_classes.cache_clear()
    yield
    action_classes.cache_clear()


def test_the_action_of_the_example_goes_through_parse_and_run(action) -> None:
    plan = KVPlan.parse("0_e_2_0_e_5")
    assert KVPlan.from_json(plan.to_json()) == plan
    assert [a.name for a in plan.actions] == ["own", "echo", "own", "read", "echo", "own"]
    model, windows = tiny_model("llama"), tokens(8, 24)
    fitted = fit_plan(model, plan, windows)
    weight = fitted.fits[1].tensors["weight"]
    assert torch.allclose(weight, weight[0, 0] * torch.eye(64, dtype=weight.dtype))
    assert weight[0, 0] != 0
    with torch.inference_mode(), apply_plan(model, fitted):
        one_shot = model(windows, use_cache=False).logits
        assert torch.allclose(model(windows, use_cache=True).logits, one_shot)
    assert footprint(model, plan).kv_fraction == 0.5


def test_the_action_of_the_example_is_searched_and_exported(
    action, tmp_path: Path, monkeypatch, store
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("search_space=layer_actions", "search_space.options.actions=[own,e]")
    few = ("study.n_trials=10", "fit.num_windows=8", "fit.window_tokens=16", "compression.kv=[0.5]")
    assert main(["sweep", *QUICK, *store, *words, *few, "hydra.run.dir=run"]) == 0
    front = json.loads(Path("run/result.json").read_text())["front"]
    echoed = [entry["plan"] for entry in front if "e" in entry["plan"].split("_")]
    assert echoed
    ship = ("export", f"plan={echoed[0]}", "hydra.run.dir=ship")
    assert main([*ship, *QUICK, *store, *few[1:3], "export.path=shipped"]) == 0
    model, windows = load_exported(tmp_path / "shipped")[0], tokens(2, 12)
    # A process that knows neither this package nor the example loads it from the folder's files.
    save_file({"windows": windows, "logits": model(windows).logits.detach()}, "both.safetensors")
    subprocess.run(
        [sys.executable, "-I", "-c", ALONE.format(tmp_path)],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )


ALONE = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
both, remote = load_file("{0}/both.safetensors"), {{"trust_remote_code": True, "dtype": "auto"}}
for folder in ("shipped", "again"):
    model = AutoModelForCausalLM.from_pretrained("{0}/" + folder, **remote)
    assert "e" in model.config.kv_plan.split("_")
    assert torch.equal(model(both["windows"]).logits, both["logits"])
    model.save_pretrained("{0}/again")
assert not {{"kvsharer_exp", "plugin_example"}} & {{name.partition(".")[0] for name in sys.modules}}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "from kvsharer_exp.extend import Action",
            "import kvsharer_exp.extend",
            "extend as a whole",
        ),
        ("import Action", "import *", r"imports kvsharer_exp\.extend\.\* as a whole"),
        ("kvsharer_exp.extend import Action", "kvsharer_exp import extend", "extend as a whole"),
        ('"plugin_example.echo_runner:EchoRunner"', 'f"{__name__}"', "does not name odd"),
    ],
)
def test_code_of_an_action_that_cannot_be_copied_is_refused(
    old: str, new: str, message: str, action, tmp_path: Path, monkeypatch
) -> None:
    text = Path(inspect.getfile(action_classes()["echo"])).read_text()
    assert old in text
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    (tmp_path / "odd.py").write_text(text)
    kind = importlib.import_module("odd").Echo
    monkeypatch.setattr(inspect, "getsource", lambda module: text.replace(old, new))
    if "__name__" in new:
        monkeypatch.setattr(kind, "runner", "odd:EchoRunner")
    with pytest.raises(InputError, match=message) as refused:
        plan_files("LlamaForCausalLM", "LlamaConfig", [kind])
    assert WAY_OUT.search(str(refused.value))


def test_imports_of_a_package_are_rewritten_wherever_they_stand(tmp_path, monkeypatch) -> None:
    package = tmp_path / "some_actions"
    package.mkdir()
    (package / "__init__.py").write_text("from .helper import two\n")
    (package / "helper.py").write_text("# ours\nimport math\ndef two(): return math.sqrt(4)\n")
    (package / "action.py").write_text(
        "from dataclasses import dataclass\n"
        "from kvsharer_exp.extend import (Action,\n    InputError as Wrong)  # both\n"
        "from . import two; from .helper import two as zwei\n"
        "class Odd(Action):\n"
        "    name, runner = 'odd', 'some_actions' '.runner:Runner'\n"
    )
    (package / "runner.py").write_text("class Runner:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("some_actions.action").Odd
    code = ForeignCode([kind], lambda module: "own_" + module.rpartition(".")[2])
    assert set(code.files) == {
        f"kvplan_of_some_actions{end}.py" for end in ("", "_action", "_helper", "_runner")
    }
    assert code.needed == {Action.__module__, InputError.__module__}
    text = code.files["kvplan_of_some_actions_action.py"]
    for line in (
        "from .own_base import Action",
        "from .own_errors import InputError as Wrong",
        "from .kvplan_of_some_actions import two",
        "from .kvplan_of_some_actions_helper import two as zwei",
        "    name, runner = ('odd', '.kvplan_of_some_actions_runner:Runner')",
    ):
        assert line in text.splitlines()
    assert code.files["kvplan_of_some_actions_helper.py"].startswith("# ours\nimport math\n")
    assert "from .kvplan_of_some_actions_runner import Runner as _Runner" in code.imported()


def test_an_action_may_run_by_a_runner_of_ours(tmp_path, monkeypatch) -> None:
    (tmp_path / "two_actions.py").write_text(
        "from kvsharer_exp.values.actions.drop import Drop\n"
        "class Named(Drop):\n"
        "    name, runner = 'named', 'kvsharer_exp.model.actions.drop:DropRunner'\n"
        "class Inherited(Drop):\n"
        "    name = 'inherited'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("two_actions")
    files = plan_files("LlamaForCausalLM", "LlamaConfig", [module.Named, module.Inherited])
    assert set(files) - set(plan_files("LlamaForCausalLM", "LlamaConfig")) == {
        "kvplan_of_two_actions.py"
    }
    assert "'.kvplan_model_actions_drop:DropRunner'" in files["kvplan_of_two_actions.py"]


def test_every_name_for_other_packages_is_defined_in_a_module_that_can_be_copied() -> None:
    for name in extend.__all__:
        module = getattr(extend, name).__module__
        assert getattr(importlib.import_module(module), name) is getattr(extend, name)


def lines_of_the_example() -> list[str]:
    text = (EXAMPLE / "README.md").read_text()
    return [line for line in text.splitlines() if line.startswith("kvsharer ")]


@pytest.mark.parametrize("line", lines_of_the_example())
@pytest.mark.slow
def test_the_example_searches_as_its_readme_says(
    line: str, example, tmp_path: Path, monkeypatch, store
) -> None:
    monkeypatch.chdir(tmp_path)
    words = line.split()[1:]
    few = ["study.n_trials=12", "scoring.report.tasks=[]", "scoring.search.tasks=[]"]
    assert main([*QUICK, *store, *few, "hydra.run.dir=run", *words]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert (result["search_space"], result["sampler"]) == ("window", "front_mix")
    assert result["fitness"] == ("worst_window" if "worst_window" in line else "kl")
    assert result["trials"]["complete"] > 0


def test_our_own_parts_come_first(tmp_path: Path, monkeypatch) -> None:
    name = next(iter(SAMPLERS))
    metadata(tmp_path, "intruder", {samplers.GROUP: {name: "intruder:sampler"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_part(name, SAMPLERS, group=samplers.GROUP, key="k") is SAMPLERS[name]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("their_missing_module:sampler", "ModuleNotFoundError"),
        ("their_module:nothing", "AttributeError"),
        ("their_module:no_sampler", "makes a list, which is no Optuna sampler"),
        ("their_module:hungry", "does not take these options"),
    ],
)
def test_a_broken_sampler_is_named(value: str, reason: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "their_module.py").write_text(
        "def no_sampler(seed, space): return []\ndef hungry(seed, space, more): ...\n"
    )
    metadata(tmp_path, "theirs", {samplers.GROUP: {"broken": value}})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError) as refused:
        make_sampler("broken", space=make_space("layer_sources", LINE, max_shared=2), seed=0)
    message = str(refused.value)
    assert "broken" in message
    assert reason in message
    assert len(message) <= 200
    assert "\n" not in message
