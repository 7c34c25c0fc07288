"""Work on torch's threads: every piece once, errors, forks, and no threads beside those of torch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from monge.ot import threads

FORKED = """
import os, signal, torch
from monge.ot.threads import run_all

torch.set_num_threads(2)
torch.ones(1000, 1000).exp()
done = []
run_all(done.append, range(4))
child = os.fork()
if child == 0:
    signal.alarm(60)  # torch's threads are gone: who waits for them waits for ever
    done.clear()
    run_all(done.append, range(4))
    os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(params=["openmp", "pool"])
def kind(request, monkeypatch):
    """Torch's own threads where there are any, and the others."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch does not use an OpenMP library that we know")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("pieces", [0, 1, 2, 7])
def test_every_piece_is_worked_on_once(kind, count, pieces):
    torch.set_num_threads(count)
    done: list[int] = []
    threads.run_all(done.append, range(pieces))
    assert sorted(done) == list(range(pieces))


def test_the_pieces_are_shared(kind):
    """Each of two pieces waits for the other: on one thread they would wait for ever."""
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=60)
    threads.run_all(lambda _: meeting.wait(), range(2))


def test_alone_means_this_thread(kind):
    torch.set_num_threads(3)
    seen = []
    threads.run_all(lambda _: seen.append(threading.get_ident()), range(3), alone=True)
    assert seen == [threading.get_ident()] * 3


@pytest.mark.parametrize("bad", range(4))
def test_an_error_is_raised_and_the_next_call_works(kind, bad):
    torch.set_num_threads(2)

    def work(piece):
        if piece == bad:
            raise KeyError(f"piece {piece}")

    with pytest.raises(KeyError, match=f"piece {bad}"):
        threads.run_all(work, range(4))
    test_every_piece_is_worked_on_once(kind, 2, 5)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc")
def test_no_threads_beside_those_of_torch():
    if threads._openmp() is None:
        pytest.skip("torch does not use an OpenMP library that we know")
    script = """if True:
        import os, torch
        from monge.ot.threads import run_all
        torch.set_num_threads(2)
        (torch.ones(2000, 2000) + 1).exp()
        before = len(os.listdir("/proc/self/task"))
        run_all(lambda _: None, range(8))
        assert len(os.listdir("/proc/self/task")) == before > 1
    """
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork_the_work_goes_on():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=120)
