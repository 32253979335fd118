"""Run functions in real processes that are connected by gloo. The processes live as long as the test session."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60.0  # seconds that a function may take
GRACE = 5.0  # seconds that the other processes get after one has failed

# Processes are forked from a server that has imported everything and started no thread. A fork of this process could
# inherit a lock that nobody releases, and a spawned process would take seconds to import torch.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "lightning.pytorch", "lightning_logme", "models", "backbones", "witness"])


class ProcessError(RuntimeError):
    """A function failed in at least one process. The message holds the tracebacks."""


class ProcessGroup:
    """A fixed number of processes. All of them run the same function, one function after the other."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world):
            mine, theirs = CONTEXT.Pipe()
            arguments = rank, world, Path(self._folder.name) / "store", theirs
            process = CONTEXT.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)

    @property
    def pids(self) -> list[int | None]:
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
        """Return what ``function(rank, world, *args)`` returns in each process.

        Raises:
            ProcessError: the function raised, returned None, ended its process, or took longer than ``patience``.
        """
        task = pickle.dumps((function, args))
        answers: dict[int, tuple[str | None, Any]] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + patience
        try:
            for connection in waiting:
                connection.send_bytes(task)
        except OSError:
            deadline = time.monotonic() + GRACE  # a process has ended: reading its answer will show it
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                answers[rank] = self._answer(rank, connection)
                if answers[rank][0] is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in waiting.values():
            answers[rank] = f"no answer within {patience:g} s, or within {GRACE:g} s after another failed", None
        errors = {rank: error for rank, (error, _) in sorted(answers.items()) if error is not None}
        if errors:
            raise ProcessError("\n".join(f"process {rank}: {error}" for rank, error in errors.items()))
        return [answers[rank][1] for rank in range(len(answers))]

    def _answer(self, rank: int, connection: Any) -> tuple[str | None, Any]:
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(GRACE)
            return f"ended with exit code {self._processes[rank].exitcode}", None

    def close(self, patience: float = GRACE) -> None:
        """End the processes; kill those that have not ended after ``patience`` seconds."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(patience)
            process.kill()
            process.join()
        self._folder.cleanup()


class Processes:
    """Process groups by their number of processes. They are started when needed, and replaced after a failure."""

    def __init__(self) -> None:
        self._groups: dict[int, ProcessGroup] = {}

    def group(self, world: int) -> ProcessGroup:
        if world not in self._groups:
            self._groups[world] = ProcessGroup(world)
        return self._groups[world]

    def run(self, function: Callable[..., Any], *args: Any, world: int = 2, patience: float = PATIENCE) -> list[Any]:
        """Return what ``function(rank, world, *args)`` returns in each of ``world`` processes, for the test to assert.

        Raises:
            ProcessError: see :meth:`ProcessGroup.run`.
        """
        group = self.group(world)
        try:
            return group.run(function, *args, patience=patience)
        except BaseException:  # the processes may still run the function, for example after a timeout of pytest
            del self._groups[world]
            group.close(patience=0.0)
            raise

    def close(self) -> None:
        while self._groups:
            self._groups.popitem()[1].close()


def _work(rank: int, world: int, store: Path, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and pytest ends its processes
    # With these variables, Lightning believes that it has launched the process itself.
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_run(task, rank, world))


def _run(task: bytes, rank: int, world: int) -> bytes:
    """Return the pickled answer: an error as text, or None and the result."""
    try:
        function, args = pickle.loads(task)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            result = function(rank, world, *args)
        if result is None:
            raise ValueError(f"{function} returned None, so that the test has nothing to assert")
        dist.barrier()
        return pickle.dumps((None, result))
    except BaseException:  # pytest.fail raises one
        return pickle.dumps((traceback.format_exc(), None))
