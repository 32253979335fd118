"""Runs in several processes, started as users start them: all that is promised of them, and none that hangs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

LAUNCHED = Path(__file__).parents[1] / "launched.py"
PATIENCE = 120  # seconds; a run that hangs would wait for half an hour, which is gloo's


def launch(out, scenario, start="popen", world=2):
    """The output of a script, what each of its processes has seen, and whether it succeeded."""
    command = [sys.executable, "-W", "ignore::FutureWarning", str(LAUNCHED), scenario, str(out), start, str(world)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, env=environment
    )
    seen = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return done.stdout, seen, done.returncode == 0


@pytest.mark.parametrize(("start", "world"), [("popen", 3), ("spawn", 2)])
def test_the_score_is_that_of_one_process(tmp_path, start, world):
    """To 1e-10: uneven shards, padding, fewer samples than processes, several loaders, accumulated gradients."""
    printed, seen, succeeded = launch(tmp_path, "exact", start, world)
    assert succeeded, printed
    assert len(seen) == world
    assert all(of_rank == seen[0] for of_rank in seen)  # to the last bit
    assert [row["num_samples"] for row in seen[0]["history"]] == [11, 11, 2, 2, 30, 30]


def test_probes_at_checkpoints(tmp_path):
    printed, seen, succeeded = launch(tmp_path, "probes_at_checkpoints")
    assert succeeded, printed
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has FSDP2 only for GPUs")
def test_fsdp2(tmp_path):
    """The score of sharded weights is that of the same weights put together, and the sharded checkpoint can be read."""
    printed, seen, succeeded = launch(tmp_path, "fsdp2")
    assert succeeded, printed
    assert seen[0] == seen[1]
    assert [row["num_samples"] for row in seen[0]["history"]] == [23, 23]


def test_tensor_parallelism_is_refused_without_ending_the_run(tmp_path):
    printed, seen, succeeded = launch(tmp_path, "tensor_parallel")
    assert succeeded, printed
    assert "logme will not be scored: under tensor parallelism" in printed
    assert all(of_rank["history"] == [] for of_rank in seen)


@pytest.mark.parametrize("start", ["popen", "spawn"])
def test_an_exception_of_one_process_ends_all(tmp_path, start):
    printed, _, succeeded = launch(tmp_path, "rank_raises", start)
    assert not succeeded
    assert "a mistake of the user's own" in printed


def test_a_killed_process_ends_all(tmp_path):
    _, _, succeeded = launch(tmp_path, "rank_killed")
    assert not succeeded


@pytest.mark.parametrize("scenario", ["first_batch_fails", "only_first_batch_fails"])
def test_a_first_batch_that_cannot_be_scored_in_one_process_is_an_error_in_all(tmp_path, scenario):
    begun = time.monotonic()
    printed, _, succeeded = launch(tmp_path, scenario)
    assert not succeeded
    assert time.monotonic() - begun < PATIENCE / 2
    for rank in (0, 1):
        message = f"[rank{rank}]: ValueError: the head 'model.2' was called 2 times for one batch"
        assert message in printed
    assert "Connection" not in printed  # nobody waited for a process that had gone


def test_a_loader_of_length_zero_in_one_process(tmp_path):
    """An error of Lightning's own, unless it is allowed: then the process passes over the validation."""
    printed, _, succeeded = launch(tmp_path, "empty_rank")
    assert not succeeded
    assert "within local rank has zero length" in printed


def test_a_loader_of_length_zero_that_is_allowed(tmp_path):
    printed, seen, succeeded = launch(tmp_path, "empty_rank_allowed")
    assert succeeded, printed
    assert "logme will not be scored: with allow_zero_length_dataloader_with_multiple_devices=True" in printed
    assert seen[0]["history"] == []
