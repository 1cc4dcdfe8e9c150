"""Run in the engine's Python: load exports one after the other, and say what vLLM made of each.

Usage: ``PYTHON generate.py JOBS.json ANSWERS.json``. A job has a ``folder``, ``prompts`` of token
ids, ``new_tokens``, ``options`` for vLLM's ``LLM``, and ``one_by_one``. Its answer has the tokens,
the KV blocks, the bytes of the parameters and the layers that keep KV, or else an ``error``.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def parameter_bytes(model: Any) -> int:
    return model.loaded_bytes


def answer(job: dict[str, Any]) -> dict[str, Any]:
    llm = LLM(job["folder"], max_model_len=256, max_num_seqs=32, **job["options"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    batches = [[prompt] for prompt in prompts] if job["one_by_one"] else [prompts]
    found = [out for batch in batches for out in llm.generate(batch, sampling, use_tqdm=False)]
    config = llm.llm_engine.vllm_config
    register = config.compilation_config.static_forward_context
    (held,) = llm.apply_model(parameter_bytes)
    return {
        "tokens": [list(out.outputs[0].token_ids) for out in found],
        "blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "parameter_bytes": held,
        "keep_kv": sorted(
            name
            for name, layer in register.items()
            if getattr(layer, "kv_sharing_target_layer_name", None) is None
        ),
    }


def main(jobs: Path, answers: Path) -> None:
    found = []
    for job in json.loads(jobs.read_text()):
        try:
            found.append(answer(job))
        except Exception as error:  # vLLM wraps what a model says in errors of many classes
            found.append({"error": _reasons(error)})
        gc.collect()
        cleanup_dist_env_and_memory()
    answers.write_text(json.dumps(found))


def _reasons(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
