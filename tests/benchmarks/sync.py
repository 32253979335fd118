"""The states of several processes are summed by all-reduce, as in ``LogME``, and by gathering, as in torchmetrics.

Each process holds the same number of samples. The processes are connected by gloo on one machine. The benchmark
measures ``metric.sync`` alone, without the evidence: the seconds until the slowest process has the sums, and the
largest peak of extra resident memory (see the module ``memory``). Both ways run in the same processes.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_logme import LogME
from tests.benchmarks.common import RESET, class_features, peak, print_table, reset_peak

_WORLDS, _WIDTH = (2, 4, 8), 1024
_QUICK_WORLDS, _QUICK_WIDTH = (2, 3), 128


def report(repeats: int, quick: bool) -> None:
    if not RESET.exists():
        print("Sync: not measured, there is no /proc here.\n")
        return
    worlds, width = (_QUICK_WORLDS, _QUICK_WIDTH) if quick else (_WORLDS, _WIDTH)
    print_table(
        f"Sync at D = {width}: a D × D matrix is {width**2 * 8 / 2**20:.0f} MiB; medians of {repeats} rounds",
        ("processes", "all-reduce, peak MiB", "gathering, peak MiB", "all-reduce, s", "gathering, s", "× faster"),
        (_row(world, width, repeats) for world in worlds),
    )


def _row(world: int, width: int, repeats: int) -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (world, port, width, repeats, folder), world, start_method="spawn")  # type: ignore[no-untyped-call]
        ranks = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    worst = {
        (way, what): median(max(rank[way][round_][what] for rank in ranks) for round_ in range(repeats))
        for way in ("reduce", "gather")
        for what in ("seconds", "memory")
    }
    fast, slow = worst["reduce", "seconds"], worst["gather", "seconds"]
    memory = (f"{worst[way, 'memory']:.0f}" for way in ("reduce", "gather"))
    return str(world), *memory, f"{fast:.3f}", f"{slow:.3f}", f"{slow / fast:.1f}"


def _process(rank: int, world: int, port: int, width: int, repeats: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    ways: dict[str, Callable[..., Any]] = {"reduce": _filled(16).dist_sync_fn, "gather": gather_all_tensors}
    for way in ways.values():
        _measure(_filled(64), way)  # open connections, allocate buffers
    metric = _filled(width)
    rounds = [{name: _measure(metric, way) for name, way in ways.items()} for _ in range(repeats)]
    figures = {name: [round_[name] for round_ in rounds] for name in ways}
    (Path(folder) / str(rank)).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def _filled(width: int) -> Any:
    metric = LogME("multiclass", width, num_classes=10)
    metric.update(*class_features(500, width, 10))
    return metric


def _measure(metric: LogME, way: Callable[..., Any]) -> dict[str, float]:
    dist.barrier()
    before, start = reset_peak(), time.perf_counter()
    metric.sync(dist_sync_fn=way)
    figures = {"seconds": time.perf_counter() - start, "memory": peak() - before}
    metric.unsync()
    return figures
