"""A server that behaves as ``FAKE_VLLM`` says; ``FAKE_PIDS`` names a file for its process ids.

``constant`` answers every prompt with one token, ``honest`` with what `load_exported` answers, and
both count what they answer. ``forgets`` counts nothing.
``deaf`` does not hear SIGTERM, ``hangs`` never answers, ``fails`` and ``no_room`` do not start.
Each has a child that does not hear SIGTERM either, as an engine that is busy.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BEHAVIOUR = os.environ["FAKE_VLLM"]
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
FAILED = """\
(EngineCore pid=7) ERROR 01-31 12:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 01-31 12:00:00 [core.py:1] ValueError: no such thing as this model
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
/usr/lib/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked
"""
NO_ROOM = """\
ValueError: To serve at least one request with the model's max seq len (1024), (0.02 GiB KV cache \
is needed, which is larger than the available KV cache memory (0.0 GiB). Try increasing
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def answer(body: dict, model: object) -> list[int]:
    if model is None:
        return [5] * body["max_tokens"]
    import torch

    ids = list(body["prompt"])
    for _ in range(body["max_tokens"]):
        logits = model(torch.tensor([ids]), use_cache=False).logits  # type: ignore[operator]
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(body["prompt"]) :]


def likelihoods(prompt: list[int], model: object) -> list[dict | None]:
    """The log-likelihoods of a prompt as vLLM gives them: each token and the likeliest."""
    import torch

    logits = model(torch.tensor([prompt]), use_cache=False).logits[0]  # type: ignore[operator]
    places: list[dict | None] = [None]
    for token, row in zip(prompt[1:], logits.float().log_softmax(-1), strict=False):
        kept = {token, int(row.argmax())}
        places.append({str(one): {"logprob": float(row[one])} for one in kept})
    return places


def choice(body: dict, model: object) -> dict:
    found = {"token_ids": answer(body, model)}
    if model is not None and "prompt_logprobs" in body:
        found["prompt_logprobs"] = likelihoods(body["prompt"], model)
    return {"prompt_logprobs": None, **found}


def counters(requests: int) -> str:
    """What the metrics say after so many requests, each of which takes half a second a token."""
    if not requests or BEHAVIOUR == "forgets":
        return ""
    name, label = "vllm:request_time_per_output_token_seconds", '{engine="0"}'
    lines = [f"{name}_count{label} {requests}.0", f"{name}_sum{label} {requests / 2}"]
    return "\n".join([*lines, f"vllm:num_preemptions_total{label} {3 * requests}.0", ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--dtype")
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    if BEHAVIOUR == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-S", "-c", CHILD])
    Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    if BEHAVIOUR in ("fails", "no_room"):
        sys.exit(FAILED if BEHAVIOUR == "fails" else NO_ROOM)
    if BEHAVIOUR == "hangs":
        time.sleep(600)
    model = None
    if BEHAVIOUR == "honest":
        import torch

        from kvsharer_exp import load_exported

        model = load_exported(options.model)[0].to(getattr(torch, options.dtype))

    answered: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            blocks = os.environ.get("FAKE_BLOCKS", "1")
            said = f'block_size="16",num_gpu_blocks="{blocks}",kv_cache_size_tokens="64"'
            self.reply(f"# HELP\nvllm:cache_config_info{{{said}}} 1.0\n" + counters(len(answered)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["max_tokens"] > 1000:
                self.reply('{"error": {"message": "max_tokens is too large"}}', 400)
            else:
                answered.append(body["max_tokens"])
                self.reply(json.dumps({"choices": [choice(body, model)]}))

        def reply(self, text: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            return

    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


main()
