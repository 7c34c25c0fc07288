"""The examples under torchrun: the losses of one process on two, and what a lost process leaves.

On gloo; on NCCL, unchanged, where there are accelerators.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as it is now, to be read alike by every run even if it is edited meanwhile."""
    return Path(shutil.copytree(ROOT / "docs", tmp_path_factory.mktemp("texts") / "docs"))


def reading(texts: Path, script: str) -> list[object]:
    """The option of the script: one example takes files, the other a glob for each kind of text."""
    return ["--text", *([texts / "*.md"] if "expert" in script else sorted(texts.glob("*.md")))]


def command(script: str, processes: int, *arguments: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    return [
        sys.executable,
        *launcher,
        "--nproc-per-node",
        str(processes),
        str(EXAMPLES / script),
        *map(str, arguments),
    ]


def environment(accelerated: bool = False) -> dict[str, str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return variables if accelerated else variables | {"CUDA_VISIBLE_DEVICES": ""}


def run(script: str, processes: int, *arguments: object, accelerated: bool = False) -> str:
    done = subprocess.run(
        command(script, processes, *arguments),
        env=environment(accelerated),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(printed: str) -> dict[str, float]:
    """Step (or validation) -> loss."""
    found = re.findall(r"^(?:step (\d+): loss|(validation) loss) ([\d.]+)", printed, re.MULTILINE)
    return {step or validation: float(loss) for step, validation, loss in found}


def test_data_parallel_losses_are_those_of_one_process(texts, tmp_path):
    options = (*reading(texts, "train_ddp.py"), "--router", "ssr", "--checkpoint-every", 2, "--steps", 4)
    alone = losses(run("train_ddp.py", 1, "--out", tmp_path / "one", *options))
    both = losses(run("train_ddp.py", 2, "--out", tmp_path / "two", "--fsdp", *options))
    assert list(alone) == list(both) == ["2", "4"]
    assert all(abs(alone[step] - both[step]) < 1e-4 for step in alone), (alone, both)
    assert alone["4"] < alone["2"]


def test_expert_parallel_losses_are_those_of_one_process(texts, tmp_path):
    options = (*reading(texts, "train_expert_parallel.py"), "--steps", 4, "--checkpoint-every", 2)
    alone, both = (
        losses(run("train_expert_parallel.py", processes, "--out", tmp_path / str(processes), *options))
        for processes in (1, 2)
    )
    assert list(alone) == list(both) == ["2", "4", "validation"]
    assert all(abs(alone[step] - both[step]) < 2e-4 for step in alone), (alone, both)


GONE = """
import gc, runpy, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

destroy = dist.destroy_process_group

def checked() -> None:
    left = [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
    print("wrapped modules:", len(left), flush=True)
    destroy()

dist.destroy_process_group = checked
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train_ddp.py", "train_expert_parallel.py"])
def test_no_wrapped_module_outlives_the_process_group(script, texts, tmp_path):
    """The last owner of a group of gloo must not be DDP, whose end can wait for ever: pytorch issue 56297."""
    (tmp_path / script).write_text(GONE)
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    arguments = ["--out", tmp_path / "run", "--steps", "1", *reading(texts, script)]
    done = subprocess.run(
        [sys.executable, tmp_path / script, EXAMPLES / script, *arguments],
        env=environment() | alone | {"PYTHONPATH": f"{ROOT}:{EXAMPLES}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wrapped modules: 0" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("script", ["train_ddp.py", "train_expert_parallel.py"])
def test_losses_on_accelerators_are_those_of_a_processor(script, texts, tmp_path):
    options = (*reading(texts, script), "--steps", 4, "--checkpoint-every", 2)
    processes = min(2, torch.accelerator.device_count())
    slow = losses(run(script, 1, "--out", tmp_path / "cpu", *options))
    fast = losses(run(script, processes, "--out", tmp_path / "gpu", *options, accelerated=True))
    assert list(slow) == list(fast)
    assert all(abs(slow[step] - fast[step]) < 5e-3 for step in slow)


def workers_of(launcher: int) -> dict[int, int]:
    """Rank -> process id of the processes that torchrun started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(child)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_process_ends_the_job_and_leaves_the_last_checkpoint(how, tmp_path):
    timeout_s = 10
    options = ("--out", tmp_path / "run", "--checkpoint-every", 3, "--timeout", timeout_s)
    with (tmp_path / "stderr").open("w+") as stderr:
        job = subprocess.Popen(
            command("train_ddp.py", 2, "--steps", 10**6, *options),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            assert job.stdout is not None
            seen = next(line for line in job.stdout if line.startswith("step 6:"))
            os.kill(workers_of(job.pid)[1], how)
            began = time.monotonic()
            rest = job.stdout.read()
            assert job.wait(timeout=120) != 0
            took = time.monotonic() - began
        finally:
            job.kill()
        stderr.seek(0)
        said = stderr.read()
    assert "another process died, or was silent" in said
    assert "goes on from there" in said
    # Within the timeout, and the 30 seconds that torchrun gives a process that does not listen.
    assert took < timeout_s + 60
    saved = [int(step) for step in re.findall(r"^step (\d+)", seen + rest, re.MULTILINE)][-1]
    whole = [path.name for path in (tmp_path / "run").glob("step-*")]
    assert whole in ([f"step-{saved}"], [f"step-{saved + 3}"])  # it may be whole before its line is printed
    if how == signal.SIGKILL:
        printed = run("train_ddp.py", 1, "--steps", saved + 6, *options)
        assert f"from {whole[0].replace('-', ' ')}" in printed
        assert all(0 < loss < 6 for loss in losses(printed).values())
