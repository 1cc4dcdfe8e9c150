"""What every message about bad input keeps to, wherever it comes from."""

import re

from kvsharer_exp.cli.terminal import LINE_CHARACTERS

WAY_OUT = re.compile(
    r"\b(give|gives|choose|check|use|did you mean|lower|raise|run|wait|name|install|uninstall|set|"
    r"see|make|try|remove|leave|allow|save|go|free|export|lists|search on|convert|add|put|open)\b"
)


def check_refusal(error: str, names: str) -> None:
    """``error``: all of stderr; ``names``: the value or the rule it has to name."""
    assert error.startswith("kvsharer: ")
    line = error.rstrip("\n")
    assert "\n" not in line
    assert len(line) <= LINE_CHARACTERS
    assert names in line
    assert WAY_OUT.search(line), line
