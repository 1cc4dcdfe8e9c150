"""Run plans of the loaded model in vLLM: refuse what it cannot do, export, serve, and clean up.

The commands ``evaluate`` and ``bench`` do this with ``engine=vllm``. Exports lie in a folder of the
run for as long as they are served. The port is one that is free.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.shipping.export import check_actions, check_model, write_export
from kvsharer_exp.shipping.exported_config import own_architecture
from kvsharer_exp.shipping.vllm.environment import EngineEnvironment, find_engine
from kvsharer_exp.shipping.vllm.folder import ELEMENT_BYTES, ExportFolder
from kvsharer_exp.shipping.vllm.server import Server, Serving, check_kv_gib
from kvsharer_exp.shipping.vllm.translate import engine_plan
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ports import free_port

_CARD = "A plan that kvsharer serves for a measurement. The folder is removed after it.\n"


class EngineRun:
    """vLLM for the plans of one run.

    ``environment`` says which vLLM it is, and ``dtype`` in which numbers it runs: those of the
    loaded model.
    """

    def __init__(self, config: Config, log: RunLog, loaded: LoadedModel, max_len: int) -> None:
        """Find the engine; ``max_len``: the most tokens of a request.

        Raises:
            InputError: there is no engine, or it cannot run this model.
        """
        self._config, self._log, self._model = config, log, loaded.model
        self._tokenizer, self.max_len = loaded.tokenizer, max_len
        self.environment: EngineEnvironment = find_engine(config.engine.python)
        self.environment.check()
        check_model(self._model)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        if self.dtype not in ELEMENT_BYTES:
            raise InputError(f"{self.dtype} is no dtype of vLLM: give model.dtype=bfloat16")

    @property
    def versions(self) -> dict[str, str]:
        """The versions in the environment of the engine, for ``result.json``."""
        found = self.environment
        return {
            "vllm": found.vllm,
            "torch": found.torch,
            "transformers": found.transformers,
            "python": found.version,
        }

    def check(self, plan: KVPlan) -> None:
        """Refuse a plan that the engine cannot run, or whose KV has no room.

        Raises:
            InputError: names the layer and the reason, the architecture, or the memory.
        """
        check_actions(plan)
        name = own_architecture(type(self._model).__name__)
        engine_plan({"architectures": [name], "kv_plan": str(plan)})
        needed = footprint(self._model, plan, context=self.max_len).kv_bytes
        check_kv_gib(self._config.serve.kv_gib, self.max_len, needed)

    @contextmanager
    def exports(self, plans: Mapping[str, FittedPlan]) -> Iterator[dict[str, ExportFolder]]:
        """Export each of ``plans``; the folders are gone after the block.

        The loaded model is then under the last plan for good, and leaves its accelerator to the
        engine.
        """
        with tempfile.TemporaryDirectory(dir=self._log.folder, prefix="served-") as place:
            folders = {name: Path(place) / name for name in plans}
            for number, (name, plan) in enumerate(plans.items(), start=1):
                last = number == len(plans)
                model = self._model if last else copy.deepcopy(self._model)
                write_export(model, self._tokenizer, plan, folders[name], card=_CARD)
                del model
            if self._model.device.type == "cuda":
                self._model.to("cpu")
                torch.cuda.empty_cache()
            yield {name: ExportFolder.read(folder) for name, folder in folders.items()}

    @contextmanager
    def serve(self, export: ExportFolder) -> Iterator[Server]:
        """Serve one of the `exports` in the block; what the server prints is in ``NAME.log``."""
        config, name = self._config, export.path.name
        serving = Serving(
            python=self.environment.python,
            folder=export.path.absolute(),
            port=free_port(),
            name=name,
            kv_gib=config.serve.kv_gib,
            max_len=self.max_len,
            dtype=self.dtype,
            eager=config.engine.eager,
        )
        log = self._log.folder / f"{name}.log"
        server = Server(serving, log, start_seconds=60 * config.engine.start_minutes)
        self._log.say(f"starting vLLM for {name} (its output is in {log.name})")
        with server:
            self._log.say(f"vLLM serves {name}")
            yield server
