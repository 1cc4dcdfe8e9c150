"""Make the script that completes our words in a shell, for ``kvsharer completion bash|zsh|fish``.

`main` prints the script. Every word is written into it, so nothing of this package runs when TAB is
pressed. ``source <(kvsharer completion bash)`` in the start-up file of the shell keeps the words up
to date (fish: ``kvsharer completion fish | source``). With ``--config-dir DIR`` or
``hydra.searchpath=[…]`` it also completes the choices of a user's folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kvsharer_exp.cli.argv import user_folders
from kvsharer_exp.cli.config.groups import groups
from kvsharer_exp.cli.config.schema import config_keys
from kvsharer_exp.values.errors import InputError

_FLAGS = ("--help", "--quiet", "--check", "--cfg", "--multirun", "--version")


def script(words: Sequence[str], commands: Iterable[str]) -> str:
    """Return the script for the shell that is named in ``words``, which follow ``completion``.

    Raises:
        InputError: no shell is named, an unknown one, or more than one; or a word is given that is
            no shell and names no folder of groups.
    """
    folders, others = user_folders(words)
    if len(others) != 1 or others[0] not in _SCRIPTS:
        said = " ".join(others) or "no shell"
        raise InputError(f"completion for {said}: give one of {', '.join(_SCRIPTS)}")
    held = groups(folders)
    choices = [f"{group}={name}" for group, names in held.items() for name in names]
    bare = [choice for choice in choices if re.fullmatch(r"[\w./=-]+", choice)]  # need no quotes
    values = {
        "COMMANDS": [*commands, "completion"],
        "SHELLS": list(_SCRIPTS),
        "FLAGS": list(_FLAGS),
        "GROUPS": [f"{group}=" for group in held],
        "CHOICES": bare,
        "KEYS": [f"{key}=" for key in _leaves(config_keys())],
    }
    text = _SCRIPTS[others[0]]
    for name, listed in values.items():
        text = text.replace(f"@{name}@", " ".join(listed))
    return text


def _leaves(keys: Sequence[str]) -> list[str]:
    """Keep keys whose value a person would give: no group, not the command, no free options."""
    inner = {key.rpartition(".")[0] for key in keys}
    return [key for key in keys if key not in inner | {"command"} and not key.endswith(".options")]


# bash itself breaks words at "=". So the script takes the word before the cursor from the line, and
# its answers begin after the "=". Old versions (3.2 on macOS) have neither compopt nor mapfile.
_BASH = """\
_kvsharer() {
    local line="${COMP_LINE:0:COMP_POINT}" words IFS=$' \\t\\n'
    local current="${line##*[[:space:]]}"
    local bare="${current#+}"
    case "$bare" in
        *=*) words="@CHOICES@" ;;
        -*) words="@FLAGS@" ;;
        *) words="@COMMANDS@ @GROUPS@ @KEYS@" ;;
    esac
    [[ $line == *" completion "* ]] && words="@SHELLS@"
    COMPREPLY=($(compgen -W "$words" -- "$bare"))
    if [[ $bare == *=* ]]; then
        if (( ${#COMPREPLY[@]} == 0 )); then
            IFS=$'\\n'
            COMPREPLY=($(compgen -f -- "${bare#*=}"))
            compopt -o filenames 2>/dev/null
        elif [[ $COMP_WORDBREAKS == *=* ]]; then
            COMPREPLY=("${COMPREPLY[@]#*=}")
        fi
    elif [[ $current == +* ]]; then
        COMPREPLY=("${COMPREPLY[@]/#/+}")
    fi
    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _kvsharer kvsharer
"""

_ZSH = """\
#compdef kvsharer
_kvsharer() {
    local -a choices found
    choices=(@CHOICES@)
    if [[ ${words[CURRENT-1]} == completion ]]; then
        compadd -- @SHELLS@
    elif [[ $PREFIX == *=* ]]; then
        found=(${(M)choices:#${${PREFIX%%=*}#+}=*})
        found=(${found#*=})
        compset -P '*='
        if (( $#found )); then compadd -a found; else _files; fi
    elif [[ $PREFIX == -* ]]; then
        compadd -- @FLAGS@
    else
        compset -P '+'
        compadd -- @COMMANDS@
        compadd -S '' -- @GROUPS@ @KEYS@
    fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _kvsharer kvsharer
"""

_FISH = """\
complete -c kvsharer -f
complete -c kvsharer -n 'not __fish_seen_subcommand_from @COMMANDS@' -a '@COMMANDS@'
complete -c kvsharer -n '__fish_seen_subcommand_from completion' -a '@SHELLS@'
complete -c kvsharer -n 'not __fish_seen_subcommand_from completion' -a '@CHOICES@ @KEYS@'
complete -c kvsharer -n 'string match -q "*=*" -- (commandline -ct)' -F
complete -c kvsharer -s h -l help
complete -c kvsharer -s q -l quiet
complete -c kvsharer -n '__fish_seen_subcommand_from serve' -l check
complete -c kvsharer -s m -l multirun
complete -c kvsharer -s c -l cfg -x -a 'job hydra all'
complete -c kvsharer -l version
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
