"""Runs in several processes that are started in the way users start them. No run may hang."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from witness import check_equals_one_process

LAUNCHED = Path(__file__).parents[1] / "launched.py"
PATIENCE = 120  # seconds; without it a run that hangs would wait for half an hour, which is gloo's timeout
HAS_FSDP2 = hasattr(torch.cpu.Stream, "record_event")

pytestmark = pytest.mark.slow


def launch(out, *scenarios, start="popen", world=2):
    """Return the output of the script, what each process of each scenario reports, and whether the script succeeded."""
    command = [sys.executable, "-W", "ignore::FutureWarning", LAUNCHED, ",".join(scenarios), out, start, world]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        env=environment,
    )
    reports = {
        scenario: [json.loads(path.read_text()) for path in sorted((out / scenario).glob("*.json"))]
        for scenario in scenarios
    }
    return done.stdout, reports, done.returncode == 0


@pytest.mark.parametrize(("start", "world"), [("popen", 3), ("spawn", 2)])
def test_the_score_is_that_of_one_process(tmp_path, start, world):
    """To 1e-10, with uneven shards, padding, fewer samples than processes, several loaders, accumulated gradients."""
    printed, reports, succeeded = launch(tmp_path, "exact", start=start, world=world)
    assert succeeded, printed
    assert len(reports["exact"]) == world
    check_equals_one_process(reports["exact"], [11, 11, 2, 2, 30, 30])


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """The output and the reports of one script that runs several scenarios: its start takes longer than they do."""
    scenarios = ["probes_at_checkpoints", "tensor_parallel", "empty_loader_allowed", *["fsdp2"] * HAS_FSDP2]
    printed, reports, succeeded = launch(tmp_path_factory.mktemp("launched"), *scenarios)
    assert succeeded, printed
    return printed, reports


def test_probes_at_checkpoints_score_the_saved_weights(launched):
    _, reports = launched
    first, second = reports["probes_at_checkpoints"]
    assert first == second
    assert first["saved"] == first["history"]
    row = first["history"][-1]
    assert (row["key"], row["num_samples"], row["global_step"]) == ("logme/others", 21, first["global_step"])
    assert row["logme"] == pytest.approx(first["expected"], rel=1e-10)


@pytest.mark.skipif(not HAS_FSDP2, reason="this torch has FSDP2 only for GPUs")
def test_fsdp2(launched):
    """Sharded weights have the score of the unsharded weights, and the sharded checkpoint can be read."""
    _, reports = launched
    first, second = reports["fsdp2"]
    assert first == second
    assert [(row["key"], row["num_samples"]) for row in first["history"]] == [("logme", 23), ("logme/model.0", 23)]
    assert first["history"][0]["logme"] == pytest.approx(first["expected"], rel=1e-10)
    assert first["is_sharded"]
    assert first["saved"] == first["history"]


def test_tensor_parallelism_is_refused_without_ending_the_run(launched):
    printed, reports = launched
    assert "logme will not be scored: under tensor parallelism" in printed
    assert [report["history"] for (report,) in reports["tensor_parallel"]] == [[], []]


@pytest.mark.parametrize("start", ["popen", "spawn"])
def test_an_exception_of_one_process_ends_all(tmp_path, start):
    printed, _, succeeded = launch(tmp_path, "one_process_raises", start=start)
    assert not succeeded
    assert "a mistake of the user's own" in printed


def test_a_killed_process_ends_all(tmp_path):
    printed, _, succeeded = launch(tmp_path, "one_process_is_killed")
    assert not succeeded
    assert "LogMECallback: the feature is the input of 'model.2'" in printed  # it began


def test_a_first_batch_that_cannot_be_scored_in_one_process_is_an_error_in_all(tmp_path):
    begun = time.monotonic()
    printed, _, succeeded = launch(tmp_path, "first_batch_fails")
    assert not succeeded
    assert time.monotonic() - begun < PATIENCE / 2
    for rank in (0, 1):
        message = f"[rank{rank}]: ValueError: the head 'model.2' was called 2 times for one batch"
        assert message in printed
    assert "Connection" not in printed  # no process waited for a process that had ended


def test_a_loader_of_length_zero_in_one_process_is_an_error_of_lightning(tmp_path):
    printed, _, succeeded = launch(tmp_path, "empty_loader")
    assert not succeeded
    assert "within local rank has zero length" in printed


def test_nothing_is_scored_where_a_loader_of_length_zero_is_allowed(launched):
    """The process without batches skips the validation, so the other processes would wait for it."""
    printed, reports = launched
    assert "logme will not be scored: with allow_zero_length_dataloader_with_multiple_devices=True" in printed
    (report,) = reports["empty_loader_allowed"][0]
    assert report["history"] == []
