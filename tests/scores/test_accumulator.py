"""The accumulator holds rows, folds them into sums by segment, and scores both alike."""

import math
import warnings

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import one_hot, problem
from streamed import assert_same_moments, rows_of

from lightning_logme.functional import evidence, logme
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.curve import curve_of
from lightning_logme.scores.jackknife import jackknife
from lightning_logme.scores.moments import Moments, Rows
from lightning_logme.scores.reduction import reduced
from lightning_logme.utilities.distributed import Failure, together


def data(n, d, k=3, seed=0, dtype=torch.float64):
    features, labels = map(torch.as_tensor, problem(n, d, k, seed, noise=2.0))
    return features.to(dtype), labels


def filled(features, labels, batch=16, segment=None, k=3, **options):
    accumulator = Accumulator("multiclass", features.shape[1], k, **options)
    for at in torch.arange(len(labels)).split(batch):
        accumulator.add(rows_of(features[at], labels[at], num_outputs=k), 0 if segment is None else segment[at], at)
    return accumulator


class TestEvidence:
    @settings(max_examples=60, deadline=None)
    @given(
        n=st.integers(3, 120),
        d=st.integers(1, 40),
        batch=st.integers(1, 50),
        segments=st.integers(1, 8),
        fold=st.booleans(),
        intercept=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_does_not_depend_on_batches_segments_or_folding(self, n, d, batch, segments, fold, intercept, seed):
        features, labels = data(n, d, seed=seed)
        accumulator = filled(features, labels, batch, torch.arange(n) * 7 % segments)
        if fold:
            accumulator.moments()
        expected = [oracles.by_singular_values(features, y) for y in one_hot(labels, 3).T]
        if intercept:
            centred = oracles.without_mean(features.numpy())
            columns = oracles.without_mean(one_hot(labels, 3))
            expected = [oracles.by_singular_values(centred, y) for y in columns.T]
        assert accumulator.num_samples == n
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # With few samples, a perfect fit may occur by chance.
            result = accumulator.evidence(intercept)
        assert result.num_samples == n
        if not bool(result.saturated.any()):
            assert float(result.score) == pytest.approx(sum(expected) / 3, rel=1e-5, abs=1e-5)

    @pytest.mark.parametrize(("n", "d"), [(20, 40), (60, 40)])
    def test_results_do_not_change_the_accumulator(self, n, d):
        features, labels = data(n, d)
        accumulator = filled(features, labels)
        first = accumulator.evidence()
        curve_of(accumulator)
        jackknife(accumulator)
        accumulator.sample()
        assert torch.equal(accumulator.evidence().score, first.score)
        accumulator.add(rows_of(features, labels), index=torch.arange(n, 2 * n))
        expected = logme(features.repeat(2, 1), labels.repeat(2))
        assert float(accumulator.evidence().score) == pytest.approx(float(expected), rel=1e-9)

    @pytest.mark.parametrize("n", [20, 60])
    def test_nan_in_a_row_gives_nan_and_a_warning(self, n):
        features, labels = data(n, 40)
        features[3, 2] = math.nan
        with pytest.warns(UserWarning, match="features contain NaN or Inf"):
            assert math.isnan(filled(features, labels).evidence().score)

    def test_without_rows_is_nan_with_a_warning(self):
        accumulator = Accumulator("multiclass", 5, 3)
        accumulator.add(Rows(torch.empty(0, 5), torch.empty(0, dtype=torch.long)), 4)
        assert (accumulator.num_samples, accumulator.nbytes, accumulator.moments()) == (0, 0, {})
        assert curve_of(accumulator) == []
        with pytest.warns(UserWarning, match="no samples"):
            assert math.isnan(accumulator.evidence().score)
        sample = accumulator.sample()
        assert (sample.rows.features.shape, len(sample)) == ((0, 5), 0)
        with pytest.warns(UserWarning, match="no samples"):
            assert jackknife(accumulator)[1] == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("n", [20, 60])
    def test_features_of_any_precision_are_summed_in_double(self, n, dtype):
        features, labels = data(n, 40, dtype=dtype)
        accumulator = filled(features, labels)
        if n < 40:
            assert {held.rows.features.dtype for held in accumulator.held} == {dtype}
        expected = logme(features.double(), labels)
        assert float(accumulator.evidence().score) == pytest.approx(float(expected), rel=1e-9)
        assert accumulator.sample().rows.features.dtype == dtype

    @pytest.mark.parametrize(("task", "columns"), [("multilabel", 2), ("regression", 1), ("regression", 3)])
    def test_targets_of_several_columns_equal_the_function(self, task, columns):
        features, labels = data(50, 20)
        target = one_hot(labels, 3)[:, :columns] if task == "multilabel" else features[:, :columns].sin().numpy()
        target = torch.as_tensor(target)
        accumulator = Accumulator(task, 20, columns)
        for at in torch.arange(50).split(15):
            accumulator.add(rows_of(features[at], target[at], task, columns))
            seen = int(at[-1]) + 1
            expected = evidence(features[:seen], target[:seen], task)
            torch.testing.assert_close(accumulator.evidence().per_output, expected.per_output, rtol=1e-8, atol=1e-10)

    def test_features_of_different_lengths_are_refused(self):
        accumulator = Accumulator("multiclass", 5, 3)
        with pytest.raises(ValueError, match="have length 6, but length 5 in earlier batches; pool them to one length"):
            accumulator.add(Rows(torch.randn(2, 6), torch.arange(2)))
        with pytest.raises(ValueError, match=r"lengths \(6, 3\) cannot be added to those of lengths \(5, 3\)"):
            accumulator.merge_(Accumulator("multiclass", 6, 3))

    def test_rows_from_inference_mode_and_training_can_be_mixed(self):
        features, labels = data(90, 30)
        accumulator = Accumulator("multiclass", 30, 3)
        for at in torch.arange(90).split(30):
            with torch.inference_mode(int(at[0]) != 30):
                accumulator.add(rows_of(features[at], labels[at]))
        assert float(accumulator.evidence().score) == pytest.approx(float(logme(features, labels)), rel=1e-9)

    @pytest.mark.parametrize("n", [20, 60])
    def test_autocast_does_not_reach_the_sums(self, n):
        features, labels = data(n, 40, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accumulator = filled(features, labels, segment=torch.arange(n) % 2)
            score, scores = accumulator.evidence().score, jackknife(accumulator)[1]
        assert float(score) == pytest.approx(float(logme(features, labels)), rel=1e-9)
        assert scores == pytest.approx(jackknife(filled(features, labels, segment=torch.arange(n) % 2))[1])

    def test_graph_is_dropped(self):
        features, labels = data(20, 40)
        accumulator = Accumulator("multiclass", 40, 3)
        accumulator.add(rows_of(features.requires_grad_() * 2, labels))
        assert not accumulator.held[0].rows.features.requires_grad


class TestFolding:
    @pytest.mark.parametrize("segments", [1, 8])
    def test_rows_are_held_while_they_have_fewer_numbers_than_the_gram_matrices(self, segments):
        features, labels = data(segments * 30 * 2, 30)
        accumulator = Accumulator("multiclass", 30, 3)
        accumulator.add(rows_of(features[:segments], labels[:segments]), torch.arange(segments))
        for stop in range(segments + 1, len(labels) + 1):
            accumulator.add(rows_of(features[stop - 1 : stop], labels[stop - 1 : stop]), stop % segments)
            assert sum(len(held.rows) for held in accumulator.held) == stop % (30 * segments)
            assert bool(accumulator.sums) == (stop >= 30 * segments)

    def test_rows_are_not_copied_while_held(self):
        features, labels = data(20, 40)
        rows = rows_of(features, labels)
        accumulator = Accumulator("multiclass", 40, 3)
        accumulator.add(rows)
        assert rows.features.data_ptr() == accumulator.held[0].rows.features.data_ptr() == features.data_ptr()

    @pytest.mark.parametrize("n", [20, 60])
    def test_rows_are_not_written_to(self, n):
        features, labels = data(n, 40)
        before = features.clone(), labels.clone()
        accumulator = filled(features, labels, segment=torch.arange(n) % 2)
        accumulator.evidence(True)
        curve_of(accumulator)
        jackknife(accumulator)
        accumulator.moments()
        assert torch.equal(features, before[0])
        assert torch.equal(labels, before[1])

    def test_memory_does_not_depend_on_the_number_of_samples(self):
        sizes = []
        for n in (4_000, 40_000):
            features, labels = data(n, 16, dtype=torch.float32)
            sizes.append(filled(features, labels, batch=512, sample_size=200).nbytes)
        assert sizes[1] == sizes[0]

    def test_moments_are_kept_by_segment(self):
        features, labels = data(100, 10)
        segment = torch.arange(100) * 3 % 5 + 2
        found = filled(features, labels, segment=segment).moments()
        assert list(found) == [2, 3, 4, 5, 6]
        for number, sums in found.items():
            expected = Moments.zeros(10, 3).accumulate(rows_of(features[segment == number], labels[segment == number]))
            assert_same_moments(sums, expected)

    @pytest.mark.parametrize("counts", [(10, 15), (10, 60), (60, 10), (60, 60)])
    def test_merged_accumulators_equal_a_single_one(self, counts):
        features, labels = data(sum(counts), 40)
        segment = torch.arange(sum(counts)) % 3
        whole = filled(features, labels, segment=segment, sample_size=30)
        merged = Accumulator("multiclass", 40, 3, sample_size=30)
        for at in torch.arange(sum(counts)).split(counts):
            part = Accumulator("multiclass", 40, 3, sample_size=30)
            part.add(rows_of(features[at], labels[at]), segment[at], at)
            merged.merge_(part)
        assert merged.num_samples == sum(counts)
        assert torch.equal(merged.sample().index, whole.sample().index)
        assert float(merged.evidence().score) == pytest.approx(float(whole.evidence().score), rel=1e-9)
        assert jackknife(merged)[1] == pytest.approx(jackknife(whole)[1], rel=1e-8)


class TestDevice:
    def test_sums_stay_on_a_device_with_float64(self):
        accumulator = filled(*data(20, 40))
        assert accumulator.to("cpu") is accumulator
        assert Accumulator("binary", 3, 2, torch.device("mps")).device == torch.device("cpu")
        assert Accumulator("binary", 3, 2, "cuda:1").device == torch.device("cuda", 1)


def test_single_process_exchanges_nothing():
    mine = {("a", 0): filled(*data(20, 40))}
    results, broken = reduced(mine, "multiclass", torch.device("cpu"), alone=True)
    assert results == mine
    assert broken == {}
    assert not results["a", 0].sums


def test_failure_in_a_single_process_keeps_its_message_and_no_traceback():
    with pytest.raises(Failure, match="^too few$") as caught, together(alone=True):
        raise ValueError("too few")
    assert caught.value.__context__.__traceback__ is None
    with pytest.raises(Failure, match="^RuntimeError: no memory$"), together(alone=True):
        raise RuntimeError("no memory")
    with pytest.raises(KeyboardInterrupt), together(alone=True):
        raise KeyboardInterrupt
