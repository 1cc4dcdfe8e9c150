"""Every message about bad input: one line, at most 200 characters, naming the way out."""

import ast
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import kvsharer_exp
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.terminal import LINE_CHARACTERS, one_line
from tests.refusals import WAY_OUT, check_refusal

PACKAGE = Path(kvsharer_exp.__file__).parent
ERRORS = (
    *("InputError", "SharingError", "SharingMapError"),
    *("KVPlanError", "PlanFileError", "FitFileError"),
)
VALUE = "x" * 20  # stands for what is filled in


def messages() -> Iterator[tuple[str, str]]:
    """(place, message with its values filled in) of every error the package raises.

    A message that another function makes is left to the command lines below.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
                text = filled(node.args[0], named)
                if text != VALUE:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def filled(node: ast.expr, named: Mapping[str, ast.expr]) -> str:
    """The longest text the expression makes; what is not written out counts 20 characters."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(filled(part, named) for part in node.values)
        case ast.FormattedValue(conversion=-1, format_spec=None):
            return filled(node.value, named)
        case ast.BinOp(op=ast.Add()):
            return filled(node.left, named) + filled(node.right, named)
        case ast.IfExp():
            return max(filled(node.body, named), filled(node.orelse, named), key=len)
        case ast.Name(id=name) if name in named:
            return filled(named[name], {})
        case ast.Call(func=ast.Name(id="did_you_mean")):  # gives that, or the choices
            return "choose one of " + VALUE
    return VALUE


MESSAGES = dict(messages())


def test_the_walk_finds_what_is_there() -> None:
    assert len(MESSAGES) > 100
    rooms = {place.split(":")[0] for place in MESSAGES}
    assert {
        "values/sharing_map.py",
        "cli/config/search.py",
        "model/load.py",
        "cli/commands/generate.py",
    } <= rooms


@pytest.mark.parametrize("place", MESSAGES)
def test_a_message_is_one_line_and_names_the_way_out(place: str) -> None:
    message = MESSAGES[place]
    assert "\n" not in message
    assert len(f"kvsharer: {message}") <= LINE_CHARACTERS
    assert WAY_OUT.search(message), message


# Command line → the value or rule it names. Those of test_cli.py, test_ship.py and test_ablate.py
# are held to the same there.
LONG = "y" * 300
COMMAND_LINES = {
    "": "no command given",
    "swep": "did you mean sweep?",
    "sweep search": "two commands given (sweep, search)",
    "sweep n_trials": "two commands given",
    "sweep command=search": "two commands given",
    "command=serch": "did you mean search?",
    "completion": "no shell",
    "completion tcsh": "tcsh",
    "--quie sweep": "did you mean --quiet?",
    "--bogus": "--bogus",
    "sweep --cfg": "--cfg needs a value",
    "sweep --cfg all-of-it": "all-of-it",
    "sweep =3": "'=3' has no key",
    "sweep model=smolm": "did you mean smollm2?",
    "sweep model=tiny +model=smollm2": "two models given (tiny, smollm2)",
    "sweep experiment=paper_mian": "did you mean paper_main?",
    "-cn other sweep": "configuration 'other' is unknown",
    LONG: "yyy",
    f"sweep model={LONG}": "yyy",
    f"sweep study.name={LONG}/": "study.name=",
    f"sweep seed={LONG}": "seed=",
    "sweep scoring=wikki": "did you mean wiki?",
    "sweep seed=1,2": "seed=1,2",
    "sweep map=${foo}": "foo",
    "sweep ~foo": "foo",
    "sweep compression.ratios=[0.1": "compression.ratios=[0.1",
    "sweep compression.ratios=3": "compression.ratios",
    "sweep compression.ratios=[a]": "compression.ratios[0]=a: give a number",
    "sweep study=3": "study",
    "sweep study.n_trials=null": "study.n_trials: give a value",
    "sweep study.n_trials=many": "study.n_trials=many: give a whole number",
    "sweep study.fresh=perhaps": "study.fresh=perhaps: give true or false",
    "sweep study.minutes=-1": "study.minutes=-1",
    "sweep study.margin=-1": "study.margin=-1",
    "sweep study.name=a/b": "a/b",
    "sweep calibration.num_windows=0": "calibration.num_windows=0",
    "sweep calibration.states=q": "calibration.states=q",
    "sweep scoring.fitness=klx": "scoring.fitness=klx is unknown: did you mean kl?",
    "sweep scoring.fitness={kl:0}": "scoring.fitness={kl: 0}: give a weight above 0",
    "sweep scoring.fitness=lm_eval scoring.search.tasks=[]": "lm_eval",
    "sweep model.dtype=float99": "float99",
    "search search.order=up": "search.order=up",
    "search search.threshold=3": "search.threshold=3",
    "calibrate calibration.window_tokens=1": "calibration.window_tokens=1",
    "calibrate heldout.num_windows=0": "heldout.num_windows=0",
    "ui ui.port=70000": "ui.port=70000",
    "doctor tracking.folders=x": "did you mean tracking.folder?",
}
# These open the store and the texts first.
WITH_A_STORE = {
    f"calibrate model=tiny calibration.path={LONG}.txt": "yyy",
    f"evaluate model=tiny map={LONG}": "yyy",
    "calibrate model=tiny calibration.path=no.pdf": "no.pdf",
    "calibrate model=tiny calibration.num_windows=999999": "999999",
    "calibrate model=tiny model.device=tpu9": "tpu9",
    "calibrate model=tiny model.device=cpu model.device_map=auto": "device_map=auto",
    "calibrate model.source=whell:smollm2": "whell:smollm2",
    "calibrate model.source=wheel:nope": "wheel:nope",
    "calibrate model.source=random:huge": "random:huge",
    "calibrate model.source=/no/such/folder": "/no/such/folder",
    "calibrate model.source=missing.gguf": "missing.gguf",
    "calibrate model=mistral": "mistralai/Mistral-7B-Instruct-v0.3",
}


@pytest.mark.parametrize("line", COMMAND_LINES, ids=lambda line: line[:50] or "nothing")
def test_a_refusal_is_one_line_with_exit_code_2(
    line: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    check_refusal(capfd.readouterr().err, COMMAND_LINES[line])


@pytest.mark.parametrize("line", WITH_A_STORE, ids=lambda line: line[:60])
def test_so_is_one_that_comes_later(line: str, tmp_path: Path, monkeypatch, capfd, store) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*line.split(), *store]) == 2
    check_refusal(capfd.readouterr().err, WITH_A_STORE[line])


def test_a_port_in_use_is_one_line(capfd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["ui", f"ui.port={port}"]) == 2
    check_refusal(capfd.readouterr().err, f"port {port} is in use")


def test_what_is_too_long_keeps_its_beginning_and_its_end() -> None:
    text = one_line("map " + "1_" * 500 + "2 has 501\nlayers: give 30")
    assert len(text) == LINE_CHARACTERS
    assert text.startswith("map 1_1_")
    assert text.endswith("2 has 501 layers: give 30")
    assert one_line("a  b\n c") == "a b c"
