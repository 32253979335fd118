"""Scores on a CUDA device equal those on the CPU."""

import pytest
import torch
from backbones import QUIET, good_to_bad, target_loader
from models import Classifier, ConvNet, VisionTransformer, images, loader, trainer, vectors
from oracles import problem

from lightning_logme import LogME, LogMECallback, rank_backbones
from lightning_logme.functional import evidence
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.moments import Rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("n", "d"), [(500, 40), (60, 300), (290, 300)])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_function_and_metric_equal_the_cpu(n, d, fit_intercept):
    features, labels = map(torch.as_tensor, problem(n, d, 5, noise=3.0))
    expected = evidence(features, labels, fit_intercept=fit_intercept)
    result = evidence(features.cuda(), labels.cuda(), fit_intercept=fit_intercept)
    metric = LogME("multiclass", d, num_classes=5, fit_intercept=fit_intercept).cuda()
    for part, target in zip(features.cuda().split(64), labels.cuda().split(64), strict=True):
        metric.update(part, target)
    for name in ("per_output", "null", "weight", "effective_dim"):
        for other in (result, metric.evidence()):
            assert getattr(other, name).is_cuda
            torch.testing.assert_close(getattr(other, name).cpu(), getattr(expected, name), rtol=1e-8, atol=1e-8)
    on_cpu = LogME("multiclass", d, num_classes=5, fit_intercept=fit_intercept)
    on_cpu.update(features, labels)
    assert metric.accuracy().value == pytest.approx(on_cpu.accuracy().value, rel=1e-6)
    assert metric.accuracy().confusion.tolist() == on_cpu.accuracy().confusion.tolist()
    assert metric.cpu().gram.device.type == "cpu"


def test_rows_are_summed_and_chosen_without_waiting_for_the_device():
    accumulator, features = Accumulator("multiclass", 8, 3, "cuda", 20), torch.randn(40, 8, device="cuda")
    labels = torch.arange(40, device="cuda") % 3
    accumulator.add(Rows(features, labels))  # The first call of a kernel may wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            accumulator.add(Rows(features, labels))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(accumulator.sample()) == 20


def test_bad_labels_raise_an_error_and_no_device_side_assert():
    metric = LogME("multiclass", 4, num_classes=3).cuda()
    with pytest.raises(ValueError, match="labels from 0 to 7"):
        metric.update(torch.randn(5, 4).cuda(), torch.tensor([0, 1, 2, 7, 1]).cuda())
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_of_small_batches_are_exact(dtype):
    features, labels = map(torch.as_tensor, problem(20_000, 12, 3))
    features = (features + 3).to(dtype)
    metric = LogME("multiclass", 12, num_classes=3).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for part, target in zip(features.cuda().split(50), labels.cuda().split(50), strict=True):
            metric.update(part, target)
    exact = features.double()
    torch.testing.assert_close(metric.gram.tril().cpu(), (exact.T @ exact).tril(), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(metric.compute().cpu(), evidence(features, labels).score, rtol=1e-9, atol=0)


def test_memory_does_not_depend_on_the_number_of_samples():
    peaks = []
    for n in (2_000, 40_000):
        metric = LogME("multiclass", 512, num_classes=10).cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(n // 1000):
            metric.update(torch.randn(1000, 512, device="cuda"), torch.arange(1000, device="cuda") % 10)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.1 * peaks[0]


def test_sums_are_reduced_by_nccl():
    features, labels = (torch.as_tensor(part).cuda() for part in problem(200, 8, 4))
    metric = LogME("multiclass", 8, num_classes=4).cuda()
    metric.update(features, labels)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.testing.assert_close(metric.compute(), evidence(features, labels).score, rtol=1e-10, atol=0)
        sums = metric.moments().all_reduce()
        torch.testing.assert_close(sums.gram, metric.gram)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("build", [ConvNet, VisionTransformer])
def test_callback_scores_every_sample_in_any_precision(tmp_path, precision, build):
    callback, data = LogMECallback(), images()
    run = trainer(tmp_path, callback, accelerator="cuda", precision=precision)
    run.fit(Classifier(build(), lr=1e-3), loader(data), loader(data))
    assert callback.history[-1]["num_samples"] == len(data)
    assert callback.history[-1]["gain"] > 0


def test_callback_scores_a_compiled_module(tmp_path):
    torch.compiler.reset()
    module, callback = Classifier(), LogMECallback()
    module.compile()
    trainer(tmp_path, callback, accelerator="cuda").fit(module, loader(vectors()), loader(vectors()))
    assert [row["num_samples"] for row in callback.history] == [96, 96]


def test_ranking_equals_that_on_the_cpu():
    candidates = {**good_to_bad(), "made": lambda: torch.nn.Linear(24, 300)}
    devices = {}
    for accelerator in ("cpu", "cuda"):
        devices[accelerator] = rank_backbones(
            candidates, target_loader(1100), **{**QUIET, "accelerator": accelerator, "race": False}
        )
    assert devices["cuda"].scores == pytest.approx(devices["cpu"].scores, abs=1e-5)
    assert len(devices["cuda"].rows) == 4
    assert all(row.peak_memory > 0 for row in devices["cuda"].rows)
    assert next(candidates["good"].parameters()).device.type == "cpu"


def test_a_candidate_that_runs_out_of_memory_does_not_end_the_ranking():
    def too_large():
        return torch.nn.Linear(24, 2**36, device="cuda")

    ranking = rank_backbones({"large": too_large, **good_to_bad()}, target_loader(), **{**QUIET, "accelerator": "cuda"})
    assert ranking.best == "good"
    assert "OutOfMemoryError" in ranking.rows[-1].message


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_probes_layers_and_curves_equal_those_on_the_cpu(tmp_path, precision):
    other = vectors(150, seed=7, classes=3)
    scores = {}
    for accelerator in ("cpu", "cuda"):
        torch.manual_seed(0)
        callback = LogMECallback(layers=["model.[01]"], layer_mean=True, curve=True, probes={"news": loader(other)})
        run = trainer(tmp_path, callback, accelerator=accelerator, precision=precision)
        state = torch.cuda.get_rng_state()
        run.validate(Classifier(), loader(), verbose=False)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        scores[accelerator] = {key: torch.tensor(curve) for key, curve in callback.curves.items()}
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    assert len(scores["cpu"]) == 8
    torch.testing.assert_close(scores["cuda"], scores["cpu"], rtol=tolerance, atol=tolerance)


def test_features_on_the_cpu_are_scored(tmp_path):
    callback = LogMECallback(features=lambda module, batch: module.model[0](batch[0]).cpu(), num_classes=4)
    trainer(tmp_path, callback, accelerator="cuda").validate(Classifier(), loader(), verbose=False)
    (row,) = callback.history
    assert row["num_samples"] == 96
    assert row["gain"] > 0
