"""The command ``serve``: an export in vLLM, on this machine; or a check of what vLLM makes of it.

Without ``--check`` the server runs until Ctrl-C. With it the server answers some prompts, says how
many KV blocks it has, and ends. Both are then compared with what this package answers and predicts.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.next_command import same_command
from kvsharer_exp.cli.session.result_file import head, identify, write_result
from kvsharer_exp.cli.terminal import make_console, one_line
from kvsharer_exp.data.load import load_passages
from kvsharer_exp.data.windows import token_windows
from kvsharer_exp.model.describe import adds_bos
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.shipping.vllm.blocks import BlockCheck
from kvsharer_exp.shipping.vllm.check import TokenCheck, check_answers
from kvsharer_exp.shipping.vllm.environment import EngineEnvironment, find_engine
from kvsharer_exp.shipping.vllm.folder import ELEMENT_BYTES, ExportFolder
from kvsharer_exp.shipping.vllm.server import Server, Serving, check_kv_gib
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.ports import check_port
from kvsharer_exp.values.text import shorten

_MIB = 2**20
_SHOWN = 5  # differences of a kind that are printed; result.json has all of them


def run(config: Config) -> int:
    """Serve until interrupted; with ``--check`` write ``result.json``, and return 1 if it fails."""
    console, wanted = make_console(), config.serve
    if wanted.folder is None:
        raise InputError("no export given: give serve.folder=FOLDER, which kvsharer export wrote")
    export = ExportFolder.read(Path(wanted.folder))
    check_port("serve.port", wanted.port)
    engine = find_engine(config.engine.python)
    engine.check()
    serving = _serving(config, export, engine)
    log = Path(HydraConfig.get().runtime.output_dir) / "server.log"
    server = Server(serving, log, start_seconds=60 * config.engine.start_minutes)
    if not config.quiet:
        console.print(f"engine   {engine}", markup=False)
        console.print(f"line     {serving.line}", markup=False)
        console.print(f"log      {log}", markup=False)
    if wanted.check:
        return _check(config, export, engine, server, console)
    # Ctrl-C ends this command and the server, also if this is a background job. `main` sees to it
    # that SIGTERM does the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with server:
        console.print(f"serving  {serving.name} at {server.client.address}/v1", markup=False)
        console.print("         (Ctrl-C stops it)")
        server.wait()
    return 0


def _serving(config: Config, export: ExportFolder, engine: EngineEnvironment) -> Serving:
    wanted, folder = config.serve, export.path.absolute()
    dtype = wanted.dtype or export.dtype
    if dtype not in ELEMENT_BYTES:
        raise InputError(
            f"{shorten(folder)} holds {dtype}, which no engine serves: give serve.dtype="
        )
    needed = wanted.prompt_tokens + wanted.new_tokens if wanted.check else 1
    if max(wanted.max_len or 0, needed) > export.max_len:
        raise InputError(
            f"{shorten(folder)} holds at most {export.max_len} tokens: lower serve.max_len, "
            "serve.prompt_tokens or serve.new_tokens"
        )
    tokens = wanted.max_len or export.max_len
    check_kv_gib(wanted.kv_gib, tokens, export.request_bytes(tokens, dtype))
    return Serving(
        python=engine.python,
        folder=folder,
        port=wanted.port,
        name=wanted.name or folder.name,
        kv_gib=wanted.kv_gib,
        max_len=wanted.max_len,
        dtype=dtype,
        eager=config.engine.eager,
    )


def _check(
    config: Config,
    export: ExportFolder,
    engine: EngineEnvironment,
    server: Server,
    console: Console,
) -> int:
    started, wanted, serving = time.perf_counter(), config.serve, server.serving
    prompts = _prompts(config, export)
    with server:
        answers = server.client.complete_all(prompts, wanted.new_tokens, at_once=len(prompts))
        report = server.client.cache_report()
    tokens = check_answers(export.path, serving.dtype, prompts, answers)
    blocks = None
    if serving.kv_bytes is not None:
        blocks = export.check_blocks(
            report,
            memory_bytes=serving.kv_bytes,
            dtype=serving.dtype,
            request_tokens=wanted.max_len or export.max_len,
        )
    for label, line in _lines(tokens, blocks, report.num_blocks):
        console.print(f"{label:8} {line}", markup=False)
    problem = tokens.problem
    if blocks is not None and not blocks.passes and not problem:
        problem = f"{blocks.reported} KV blocks reported, {blocks.predicted.num_blocks} predicted"
    folder = server.log.parent
    model = {
        "id": export.path.absolute().name,
        "num_layers": export.plan.num_layers,
        "num_key_value_heads": export.num_key_value_heads,
        "head_dim": export.head_dim,
    }
    seconds = time.perf_counter() - started
    result = {
        **head(config, model=model, seconds=seconds, mlflow_run_id=None, versions=environment()),
        **identify(export.plan),
        "engine": asdict(engine),
        "line": serving.line,
        "passes": not problem,
        "tokens": tokens.to_dict(),
        "cache": asdict(report),
        "blocks": None if blocks is None else blocks.to_dict(),
    }
    write_result(folder, result)
    console.print(f"\nresult   {folder / 'result.json'}", markup=False)
    if problem:
        print(one_line(f"kvsharer: the check failed: {problem}"), file=sys.stderr)
    elif not config.quiet:
        then = same_command(config, without=["serve.check"])
        console.print(f"next     {then}", markup=False)
    return 1 if problem else 0


def _prompts(config: Config, export: ExportFolder) -> list[list[int]]:
    """Cut prompts of different lengths from the held-out text."""
    wanted, tokenizer = config.serve, export.tokenizer()
    windows = token_windows(
        load_passages(config.heldout.path),
        tokenizer,
        num_windows=wanted.prompts,
        window_tokens=wanted.prompt_tokens,
        seed=config.seed,
        add_bos=adds_bos(ModelSpec(export.path.name, str(export.path)), tokenizer),
    )
    shortest = (wanted.prompt_tokens + 1) // 2
    return [
        window[: wanted.prompt_tokens - index % shortest]
        for index, window in enumerate(windows.tolist())
    ]


def _lines(tokens: TokenCheck, blocks: BlockCheck | None, reported: int) -> list[tuple[str, str]]:
    own = f"; the reference differs from itself at {tokens.own}" if tokens.own else ""
    lines = [("tokens", f"{tokens.equal} of {tokens.positions} equal in {tokens.dtype}{own}")]
    for label, found in (("differs", tokens.wrong), ("tie", tokens.ties)):
        lines += [(label, str(difference)) for difference in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(("", f"and {len(found) - _SHOWN} more"))
    if tokens.problem and tokens.dtype != "float32":
        lines.append(("", "runtimes round differently; serve.dtype=float32 compares every token"))
    if blocks is None:
        return [*lines, ("blocks", f"{reported} reported; serve.kv_gib= lets them be predicted")]
    held = blocks.predicted
    groups = f"{len(held.group_windows)} groups of " if len(held.group_windows) > 1 else ""
    padding = f", {held.padding} places empty" if held.padding else ""
    lines.append(
        (
            "blocks",
            f"{reported} reported, {held.num_blocks} predicted (full cache: "
            f"{blocks.full.num_blocks}): {groups}{held.group_layers} layers × "
            f"{held.page_bytes:,} bytes for {held.block_size} tokens{padding}",
        )
    )
    plan, full = (size / _MIB for size in (blocks.request_bytes, blocks.full_request_bytes))
    saving = "" if blocks.saves else ": this plan saves nothing in vLLM"
    lines.append(
        (
            "request",
            f"{blocks.request_tokens:,} tokens hold {plan:,.1f} MiB of KV (full cache: "
            f"{full:,.1f} MiB){saving}",
        )
    )
    return lines
