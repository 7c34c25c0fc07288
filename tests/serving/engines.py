"""The engines, each started with the Python of its own environment; none of them knows monge.

`make test-serving` makes the environments that are named here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
VLLM = ROOT / ".venv-serving-vllm"
LLAMA_CPP = ROOT / ".venv-serving-llama-cpp"
CONVERTER = LLAMA_CPP / "llama.cpp" / "convert_hf_to_gguf.py"

Answer = dict[str, Any]
"""{"prompt": token ids, "tokens": token ids, "text": str}."""

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # to no core of its own: others may be at work there
    "VLLM_NO_USAGE_STATS": "1",
}
START = 900
"""Seconds that vLLM may take to import itself and to load: four minutes on two busy cores."""


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS


def _run(words: Sequence[object]) -> str:
    done = subprocess.run(
        [str(word) for word in words], env=_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def write_gguf(model: Path, file: Path) -> None:
    """Convert the checkpoint ``model`` by llama.cpp's own converter, in float32."""
    _run([LLAMA_CPP / "bin/python", CONVERTER, model, "--outfile", file, "--outtype", "f32"])


def ask_llama_cpp(file: Path, prompts: Sequence[str], count: int, folder: Path) -> list[Answer]:
    """The ``count`` greedy tokens of llama.cpp after each of ``prompts``; ``folder`` takes a file."""
    asked = folder / "prompts.json"
    asked.write_text(json.dumps(list(prompts)))
    return json.loads(_run([LLAMA_CPP / "bin/python", HERE / "with_llama_cpp.py", file, asked, count]))


@contextmanager
def serve_with_vllm(model: Path, log: Path) -> Iterator[str]:
    """The address of vLLM's OpenAI-compatible server for ``model``, ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`: that asks for the metadata of a package vllm, which vllm-cpu 0.32.0 does not have.
    words = [VLLM / "bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", model,
             "--served-model-name", "monge", "--host", "127.0.0.1", "--port", port, "--dtype", "float32",
             "--enforce-eager", "--max-model-len", 512]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(word) for word in words], env=_environment(), stdout=output, stderr=output
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, server, log)
            yield address
        finally:
            server.terminate()  # it ends its own workers
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        assert server.poll() is None, f"vLLM ended:\n{log.read_text()[-4000:]}"
        try:
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"vLLM did not answer within {START} seconds:\n{log.read_text()[-4000:]}")


def ask(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of a server to a request of the OpenAI API."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def ask_vllm(address: str, prompts: Sequence[str], count: int) -> list[Answer]:
    """The ``count`` greedy tokens of vLLM after each of ``prompts``, which it computes as one batch."""
    body = {
        "model": "monge",
        "prompt": list(prompts),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    choices = sorted(ask(address, "/v1/completions", body)["choices"], key=lambda choice: choice["index"])
    return [{"prompt": c["prompt_token_ids"], "tokens": c["token_ids"], "text": c["text"]} for c in choices]
