"""Runs a function in several real processes that are connected by gloo."""

import multiprocessing
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked off a server that has imported everything and started no thread: a fork of this process could
# inherit a lock that nobody will release, and a spawned one takes seconds to import torch.
multiprocessing.set_forkserver_preload(["torch", "lightning_logme.metric", "lightning_logme.functional"])


def spawn(function, *args, world=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, (world, port, function, args), nprocs=world, start_method="forkserver")


def _process(rank, world, port, function, args):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        function(rank, world, *args)
        dist.barrier()  # nobody leaves while another still needs its store
    finally:
        dist.destroy_process_group()
