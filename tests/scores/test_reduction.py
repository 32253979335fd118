"""Accumulators and agreement in two or three real processes."""

import math

import pytest
import torch
import torch.distributed as dist
from oracles import problem
from spawned import spawn
from streamed import rows_of

from lightning_logme import LogME
from lightning_logme.functional import evidence
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.jackknife import jackknife
from lightning_logme.scores.reduction import reduced
from lightning_logme.utilities.distributed import Failure, together

CPU = torch.device("cpu")


def accumulated(n, d, at, size=64, k=4, seed=0):
    features, labels = map(torch.as_tensor, problem(n, d, k, seed))
    accumulator = Accumulator("multiclass", d, k, sample_size=size)
    for index in at.split(16):
        accumulator.add(rows_of(features[index], labels[index], num_outputs=k), index % 3, index)
    return accumulator


def _equals_one_process(rank, world, n, d, empty_rank):
    full = [other for other in range(world) if other != empty_rank]
    mine = {}
    if rank in full:
        mine = {("deep", 0): accumulated(n, d, torch.arange(n)[full.index(rank) :: len(full)])}
    if rank == world - 1:
        mine["only here", 1] = accumulated(30, 5, torch.arange(30))
    results, broken = reduced(mine, "multiclass", CPU, alone=False)
    assert broken == {}
    assert list(results) == [("deep", 0), ("only here", 1)]
    for key, (number, width) in zip(results, [(n, d), (30, 5)], strict=True):
        found, expected = results[key], accumulated(number, width, torch.arange(number))
        assert found.num_samples == number
        torch.testing.assert_close(found.evidence().score, expected.evidence().score, rtol=1e-8, atol=0)
        assert [point[0] for point in found.curve()] == [point[0] for point in expected.curve()]
        assert jackknife(found)[1] == pytest.approx(jackknife(expected)[1], rel=1e-7)
        (rows, index), (same_rows, same_index) = found.sample(), expected.sample()
        assert torch.equal(index, same_index)
        assert torch.equal(rows.features, same_rows.features)
        assert torch.equal(rows.target, same_rows.target)


@pytest.mark.parametrize(("n", "d", "empty_rank", "world"), [(200, 8, None, 2), (50, 60, 0, 2), (200, 8, 1, 3)])
def test_reduced_is_as_one_process(n, d, empty_rank, world):
    spawn(_equals_one_process, n, d, empty_rank, world=world)


def _different_shapes(rank, world):
    mine = {"a": accumulated(20, 5 + rank, torch.arange(20)), "b": accumulated(20, 5, torch.arange(20)[rank::2])}
    results, broken = reduced(mine, "multiclass", CPU, alone=False)
    assert broken == {"a": "features or targets of lengths (6, 4) in process 1, and (5, 4) in another"}
    assert results["b"].evidence().num_samples == 20
    assert "a" not in results


def test_shapes_that_differ_break_only_their_key():
    spawn(_different_shapes)


def _fail_if(condition, error):
    if condition:
        raise error


def _failures(rank, world):
    with together(alone=False):
        pass
    with pytest.raises(Failure, match=r"^RuntimeError: no memory \(process 1\)$"), together(alone=False):
        _fail_if(rank == 1, RuntimeError("no memory"))
    with pytest.raises(Failure, match=r"^the same in all$"), together(alone=False):
        raise ValueError("the same in all")
    with pytest.raises(Failure, match=r"^inner \(process 0\)$"), together(alone=False), together(alone=False):
        _fail_if(rank == 0, ValueError("inner"))
    dist.barrier()


def test_what_fails_in_one_process_fails_in_all():
    spawn(_failures)


def _metric_of_few_rows(rank, world, number, width):
    features, labels = map(torch.as_tensor, problem(number, width, 4))
    metric = LogME("multiclass", width, num_classes=4)
    if rank:  # the first process sees no data
        metric.update(features[rank - 1 :: world - 1], labels[rank - 1 :: world - 1])
    else:
        metric.update(features[:0], labels[:0])
    for _ in range(2):
        torch.testing.assert_close(metric.compute(), evidence(features, labels).score, rtol=1e-8, atol=0)
        metric._computed = None
    metric.update(features[:4], labels[:4])
    assert metric.evidence().num_samples == number + 4 * world
    metric.reset()
    metric.sync()
    assert math.isclose(float(metric.count), 0)
    metric.unsync()


@pytest.mark.parametrize(("number", "width"), [(30, 50), (30, 12), (90, 50)])
def test_metric_of_few_rows(number, width):
    spawn(_metric_of_few_rows, number, width, world=3)
