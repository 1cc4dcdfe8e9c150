"""The command line: ``kvsharer COMMAND key=value …``, in any order, on top of Hydra.

`main` is the entry point of the console script and of ``python -m kvsharer_exp``. It turns the
words into Hydra's (`argv`), composes and checks the configuration (`config`), runs the command
(`session.parts`), and turns every error into one line and an exit code (`error_line`).
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import chdir, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kvsharer_exp import __version__
from kvsharer_exp.cli import completion
from kvsharer_exp.cli.argv import COMMANDS, translate
from kvsharer_exp.cli.config.compose import register, to_config
from kvsharer_exp.cli.config.passwords import mask_passwords
from kvsharer_exp.cli.error_line import is_bad_input, verdict
from kvsharer_exp.cli.help import help_text, is_plain
from kvsharer_exp.cli.session.parts import run_command
from kvsharer_exp.cli.stopping import Terminated, stops_on_sigterm
from kvsharer_exp.cli.terminal import one_line, settle_streams
from kvsharer_exp.measure.machine import settle
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    It is 0 when all is done, 1 after a failure, 2 after bad input, 130 after Ctrl-C, and 143 after
    SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    settle_streams()
    if arguments == ["--version"]:
        print(f"kvsharer {__version__}")
        return 0
    debug = "debug=true" in (argument.lower() for argument in arguments)
    settle()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us instead of Hydra's own printer
    try:
        if arguments[:1] == ["completion"]:
            print(completion.script(arguments[1:], COMMANDS), end="")
            return 0
        with stops_on_sigterm():
            return _run(translate(arguments))
    except Terminated:
        print("kvsharer: terminated; what was done is kept", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("kvsharer: interrupted; what was done is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `kvsharer --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        text, code = verdict(error)
        print(one_line(f"kvsharer: {text}"), file=sys.stderr)
        return code


def _run(arguments: Sequence[str]) -> int:
    register(data_dir("search_spaces"))
    if is_plain(arguments):
        print(help_text(arguments))
        return 0
    failures: list[BaseException] = []
    here = os.getpid()
    codes = [0]

    def job(composed: DictConfig) -> None:
        # Hydra prints a line of its own about an error that leaves here, so it is kept instead, and
        # the next job of -m begins. An interrupt leaves here, and ends all of them.
        hydra_config = HydraConfig.get()
        try:
            mask_passwords(Path(hydra_config.runtime.output_dir), hydra_config.output_subdir)
            if hydra_config.mode == RunMode.MULTIRUN:
                mask_passwords(Path(hydra_config.sweep.dir))
            # hydra.job.chdir=true would turn every relative path of the user into another one.
            with chdir(hydra_config.runtime.cwd):
                codes.append(run_command(to_config(composed)))
        except Exception as error:
            if os.getpid() != here:  # a launcher runs the job elsewhere, and tells of its failure
                raise
            failures.append(error)
            if is_bad_input(error):
                folder, log = Path(hydra_config.runtime.output_dir), f"{hydra_config.job.name}.log"
                _remove_unused(folder, hydra_config.output_subdir, log)

    decorate: Callable[[Callable[[DictConfig], None]], Callable[[], None]] = hydra.main(
        version_base="1.3", config_path=str(data_dir("conf")), config_name="config"
    )
    before = sys.argv
    sys.argv = ["kvsharer", *arguments]
    try:
        decorate(job)()
    except (FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError) as error:
        # The job keeps its errors, so it is Hydra that finds no place for the folder of the run.
        raise InputError(
            f"the run folder {shorten(error.filename)} cannot be made ({error.strerror}): give "
            "another hydra.run.dir, or run in another folder"
        ) from error
    finally:
        sys.argv = before
    if failures:
        raise failures[0]
    return max(codes)


def _remove_unused(folder: Path, subdir: str | None, log: str) -> None:
    """Remove a run folder that holds what Hydra put there, and nothing of the command's.

    Of ``outputs/COMMAND``, where run folders lie by default, what is empty then goes too.
    """
    kept = [path for path in folder.iterdir() if path.name != subdir]
    empty = all(path.name == log and not path.stat().st_size for path in kept)
    if empty and folder != Path.cwd():
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parents[1] == Path.cwd() / "outputs":
            for parent in folder.parents[:2]:
                with suppress(OSError):  # it holds other runs
                    parent.rmdir()
