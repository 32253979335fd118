"""The processes of a test session: a failure in one of them is an error of the current test, and of no other test."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from spawned import ProcessError


def _sum_of_ranks(rank, world):
    total = torch.tensor(rank)
    dist.all_reduce(total)
    return os.getpid(), rank, world, int(total)


def _fail_in_second(rank, world, how):
    if rank == 1:
        if how == "raises":
            raise OSError("disk on fire")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(600)
        return None
    dist.barrier()  # the first process waits for the second
    return rank


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_are_connected_and_kept(processes, world):
    first = processes.run(_sum_of_ranks, world=world)
    assert [answer[1:] for answer in first] == [(rank, world, sum(range(world))) for rank in range(world)]
    assert len({pid for pid, *_ in first} | {os.getpid()}) == world + 1
    assert processes.run(_sum_of_ranks, world=world) == first


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "process 1: Traceback(?s:.*)OSError: disk on fire"),
        ("is killed", "process 1: ended with exit code -9"),
        ("hangs", "process 1: no answer within 1 s"),
        ("returns nothing", "process 1: Traceback(?s:.*)_fail_in_second at .* returned None"),
    ],
)
def test_a_process_that_fails_is_an_error_and_is_replaced(processes, monkeypatch, how, message):
    monkeypatch.setattr("spawned.GRACE", 0.5)
    before = processes.group(2).pids
    with pytest.raises(ProcessError, match=message):
        processes.run(_fail_in_second, how, patience=1.0 if how == "hangs" else 60.0)
    after = processes.run(_sum_of_ranks)
    assert [answer[1:] for answer in after] == [(0, 2, 1), (1, 2, 1)]
    assert not {pid for pid, *_ in after} & set(before)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interrupted_test_leaves_no_process_behind(processes, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = processes.group(2).pids
    with monkeypatch.context() as patch:
        patch.setattr("spawned.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            processes.run(_sum_of_ranks)
    assert not {pid for pid, *_ in processes.run(_sum_of_ranks)} & set(before)
