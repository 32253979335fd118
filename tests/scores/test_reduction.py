"""Two or three real processes add up their accumulators, and raise the same error."""

from contextlib import ExitStack

import pytest
import torch
from oracles import problem
from streamed import rows_of

from lightning_logme import LogME
from lightning_logme.functional import evidence
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.curve import curve_of
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


def contents(accumulator):
    sample = accumulator.sample()
    return {
        "num_samples": accumulator.num_samples,
        "score": accumulator.evidence().score,
        "curve": [point.num_samples for point in curve_of(accumulator)],
        "jackknife": jackknife(accumulator)[1],
        "sample": (sample.index, sample.rows.features, sample.rows.target),
    }


def _reduced(rank, world, n, d, empty_rank):
    full = [other for other in range(world) if other != empty_rank]
    mine = {}
    if rank in full:
        mine = {("deep", 0): accumulated(n, d, torch.arange(n)[full.index(rank) :: len(full)])}
    if rank == world - 1:
        mine["only here", 1] = accumulated(30, 5, torch.arange(30))
    results, broken = reduced(mine, "multiclass", CPU, alone=False)
    return {key: contents(result) for key, result in results.items()}, broken


@pytest.mark.parametrize(("n", "d", "empty_rank", "world"), [(200, 8, None, 2), (50, 60, 0, 2), (200, 8, 1, 3)])
def test_reduced_accumulators_equal_those_of_one_process(processes, n, d, empty_rank, world):
    sizes = {("deep", 0): (n, d), ("only here", 1): (30, 5)}
    expected = {key: contents(accumulated(*size, torch.arange(size[0]))) for key, size in sizes.items()}
    for results, broken in processes.run(_reduced, n, d, empty_rank, world=world):
        assert broken == {}
        assert list(results) == list(expected)
        for key, found in results.items():
            assert found["num_samples"] == expected[key]["num_samples"] == sizes[key][0]
            torch.testing.assert_close(found["score"], expected[key]["score"], rtol=1e-8, atol=0)
            assert found["curve"] == expected[key]["curve"]
            assert found["jackknife"] == pytest.approx(expected[key]["jackknife"], rel=1e-7)
            torch.testing.assert_close(found["sample"], expected[key]["sample"], rtol=0, atol=0)


def _different_shapes(rank, world):
    mine = {"a": accumulated(20, 5 + rank, torch.arange(20)), "b": accumulated(20, 5, torch.arange(20)[rank::2])}
    results, broken = reduced(mine, "multiclass", CPU, alone=False)
    return {key: result.evidence().num_samples for key, result in results.items()}, broken


def test_shapes_that_differ_between_processes_break_only_their_key(processes):
    message = "features and targets have lengths (6, 4) in process 1, but (5, 4) in another process"
    assert processes.run(_different_shapes) == [({"b": 20}, {"a": message})] * 2


def _failure(rank, world, errors, depth):
    """Return the text of the error that this process raises, where each process fails in its own way or not at all."""
    try:
        with ExitStack() as stack:
            for _ in range(depth):
                stack.enter_context(together(alone=False))
            if errors[rank] is not None:
                raise errors[rank]
    except Failure as failure:
        return str(failure)
    return "none"


@pytest.mark.parametrize(
    ("errors", "depth", "message"),
    [
        ([None, None], 1, "none"),
        ([None, RuntimeError("no memory")], 1, "RuntimeError: no memory (process 1)"),
        ([ValueError("the same in all")] * 2, 1, "the same in all"),
        ([ValueError("inner"), None], 2, "inner (process 0)"),
    ],
)
def test_an_error_in_one_process_is_raised_in_all(processes, errors, depth, message):
    assert processes.run(_failure, errors, depth) == [message] * 2


def _metric_of_few_rows(rank, world, number, width):
    features, labels = map(torch.as_tensor, problem(number, width, 4))
    metric = LogME("multiclass", width, num_classes=4)
    mine = slice(rank - 1, None, world - 1) if rank else slice(0, 0)  # the first process sees no data
    metric.update(features[mine], labels[mine])
    scores = [metric.compute()]
    metric.update(features[:0], labels[:0])
    scores.append(metric.compute())
    metric.update(features[:4], labels[:4])
    num_samples = metric.evidence().num_samples
    metric.reset()
    metric.sync()
    count = float(metric.count)
    metric.unsync()
    return scores, num_samples, count


@pytest.mark.parametrize(("number", "width"), [(30, 50), (30, 12), (90, 50)])
def test_metric_of_few_rows_equals_that_of_one_process(processes, number, width):
    expected = evidence(*map(torch.as_tensor, problem(number, width, 4))).score
    for scores, num_samples, count in processes.run(_metric_of_few_rows, number, width, world=3):
        torch.testing.assert_close(scores, [expected] * 2, rtol=1e-8, atol=0)
        assert num_samples == number + 4 * 3
        assert count == 0
