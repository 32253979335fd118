"""rank_backbones on one device: results, arguments and errors."""

import csv
import math
import re

import numpy as np
import pytest
import torch
from backbones import CLASSES, QUIET, WIDTH, Columns, good_to_bad, rank, target_loader, target_set
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from oracles import digits_features
from sklearn.metrics import accuracy_score, f1_score, r2_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import rank_backbones
from lightning_logme.features.sampling import Samples
from lightning_logme.functional import evidence, leave_one_out, logme
from lightning_logme.scores.accuracy import Accuracy, measure
from lightning_logme.scores.subset import SAMPLE_SIZE, index_of, mixed


class TestResult:
    def test_scores_are_those_of_all_features_at_once(self):
        ranking = rank(race=False)
        x, y = target_set().tensors
        assert ranking.best == "good"
        assert [row.name for row in ranking.rows] == ["good", "fair", "bad"] == list(ranking.scores)
        for name, model in good_to_bad().items():
            with torch.no_grad():
                expected = evidence(model(x), y)
            (row,) = (row for row in ranking.rows if row.name == name)
            assert ranking.scores[name] == row.logme == pytest.approx(float(expected.score), abs=1e-9)
            assert row.gain == pytest.approx(float(expected.gain), abs=1e-9)
            torch.testing.assert_close(ranking.evidence[name].weight, expected.weight)
            assert (row.num_features, row.num_parameters, row.num_samples) == (8, 1, 600)
            assert (row.ended, row.message, row.peak_memory) == ("finished", "", None)
            assert row.seconds > 0

    def test_a_race_drops_candidates_that_trail_and_keeps_the_winner(self):
        ranking = rank(loader=target_loader(2000))
        assert ranking.best == "good"
        good, fair, bad = ranking.rows
        assert (bad.name, bad.ended, bad.num_samples) == ("bad", "dropped", 256)
        assert re.fullmatch(r"\d+\.\d standard errors behind at 256 samples", bad.message)
        assert good.ended == "finished"
        assert good.num_samples >= fair.num_samples > bad.num_samples or fair.ended == "dropped"
        assert [row.tied_with_best for row in ranking.rows] == [True, False, False]

    def test_candidates_with_the_same_features_are_tied(self):
        ranking = rank({**good_to_bad(), "good too": Columns(0, 8), "good, scaled": nn.Sequential(Columns(0, 8))})
        assert set(ranking.tied) == {"good", "good too", "good, scaled"}
        assert all(row.ended == "finished" for row in ranking.rows if row.tied_with_best)

    @pytest.mark.parametrize("race", [False, True])
    def test_candidates_that_differ_by_chance_are_tied(self, race):
        """Two candidates differ in a column without information. Dropped candidates count as compared too."""

        class With(nn.Module):
            def __init__(self, column):
                super().__init__()
                self.column = column

            def forward(self, x):
                return x[:, [*range(8), self.column]]

        ranking = rank({"23": With(23), "22": With(22), "bad": Columns(16, 24)}, target_loader(2000), race=race)
        assert ranking.rows[0].logme > ranking.rows[1].logme
        assert set(ranking.tied) == {"22", "23"}

    def test_curves_have_a_point_for_each_round(self):
        ranking = rank(loader=target_loader(2000), race=False)
        assert [point.num_samples for point in ranking.curves["good"]] == [256, 512, 1024, 2000]
        last = ranking.curves["good"][-1]
        assert (last.logme, last.gain) == (ranking.rows[0].logme, ranking.rows[0].gain)
        assert ranking.curves["good"][0].gain < last.gain

    def test_a_race_and_a_full_pass_agree_on_the_rounds_they_share(self):
        race, full = rank(loader=target_loader(2000)), rank(loader=target_loader(2000), race=False)
        assert race.best == full.best
        assert race.curves.keys() == full.curves.keys() == {"good", "fair", "bad"}
        for name, curve in race.curves.items():
            assert curve
            for mine, whole in zip(curve, full.curves[name], strict=False):
                assert mine == pytest.approx(whole, abs=1e-9)

    def test_the_head_predicts_the_labels(self):
        ranking = rank()
        x, y = target_set().tensors
        with torch.no_grad():
            guess = ranking.head()(good_to_bad()["good"](x)).argmax(1)
        assert (guess == y).float().mean() > 0.8
        assert ranking.head("bad").in_features == 8
        with pytest.raises(KeyError, match="no evidence for 'ugly', only for 'good'"):
            ranking.head("ugly")

    def test_table_and_csv_hold_every_candidate(self, tmp_path):
        ranking = rank()
        lines = str(ranking).splitlines()
        assert len(lines) == 4
        assert lines[0].split()[:2] == ["candidate", "gain"]
        assert lines[1].startswith("1  good")
        ranking.to_csv(tmp_path / "ranking.csv")
        with open(tmp_path / "ranking.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == ["good", "fair", "bad"]
        assert float(rows[0]["logme"]) == ranking.rows[0].logme
        assert ranking.to_markdown().count("\n") == 4

    def test_plots_show_every_candidate(self):
        ranking = rank(loader=target_loader(2000))
        axes = ranking.plot().axes[0]
        assert [bar.get_width() for bar in axes.patches] == [row.gain for row in ranking.rows]
        assert axes.get_yticklabels()[0].get_text() == "good"
        lines = ranking.plot_curves().axes[0].lines
        assert [line.get_label() for line in lines] == [row.name for row in ranking.rows]
        assert list(lines[0].get_ydata()) == [point.gain for point in ranking.curves["good"]]

    @pytest.mark.parametrize("fit_intercept", [False, True])
    def test_regression_scores_are_those_of_logme(self, fit_intercept):
        x, _ = target_set().tensors
        y = x[:, 0] + 0.1 * torch.randn(len(x))
        loader = DataLoader(TensorDataset(x, y), batch_size=64)
        options = {"task": "regression", "num_classes": None, "fit_intercept": fit_intercept, "race": False}
        ranking = rank(loader=loader, **options)
        assert ranking.best == "good"
        expected = logme(x[:, :8], y, "regression", fit_intercept=fit_intercept)
        assert ranking.scores["good"] == pytest.approx(float(expected), abs=1e-6)

    def test_normalize_scores_unit_vectors(self):
        x, y = target_set().tensors
        for precision in (None, "bf16-true"):
            ranking = rank(normalize=True, race=False, precision=precision)
            expected = float(logme(nn.functional.normalize(x[:, :8]), y))
            assert ranking.scores["good"] == pytest.approx(expected, abs=1e-6 if precision is None else 2e-3)
            assert ranking.scores["good"] != pytest.approx(rank(race=False).scores["good"], abs=1e-2)

    def test_binary_and_multilabel_scores_are_those_of_logme(self):
        x, y = target_set().tensors
        options = {"num_classes": None, "race": False}
        binary = rank(loader=DataLoader(TensorDataset(x, y % 2), 64), task="binary", **options)
        assert binary.scores["good"] == pytest.approx(float(logme(x[:, :8], y % 2, "binary")), abs=1e-6)
        labels = torch.stack([y % 2, y // 2], 1)
        several = rank(loader=DataLoader(TensorDataset(x, labels), 64), task="multilabel", **options)
        assert several.scores["good"] == pytest.approx(float(logme(x[:, :8], labels, "multilabel")), abs=1e-6)


def metric_of(predictions, target, task):
    """Return scikit-learn's value of the task's metric."""
    if task == "regression":
        return r2_score(target, predictions)
    if task == "multilabel":
        return f1_score(target, predictions > 0.5, average="macro")
    return accuracy_score(target, predictions.argmax(1))


def tasks():
    """Return labels of the target set for each task."""
    x, y = target_set().tensors
    several = torch.stack([y % 2, y // 2, (y == 0).long()], 1)
    ratings = x[:, :2] + 0.3 * torch.randn(len(x), 2)
    return {"multiclass": y, "binary": y % 2, "multilabel": several, "regression": ratings}


def sure_or_right(n=2000):
    """Return two candidates, and a bad one, with the data set.

    The features of one are the labels, of which one in nine is wrong: it has the higher LogME. The other has noisy
    features that are rarely wrong: it has the higher accuracy.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    wrong = torch.rand(n, generator=generator) < 1 / 9
    ones = nn.functional.one_hot(torch.stack([(labels + wrong) % CLASSES, labels], 1), CLASSES).flatten(1)
    noise = torch.tensor([0.01, 0.3]).repeat_interleave(CLASSES)
    x = torch.cat([ones + noise * torch.randn(n, 8, generator=generator), torch.randn(n, 4, generator=generator)], 1)
    candidates = {"bad": Columns(8, 12), "right": Columns(4, 8), "sure": Columns(0, 4)}
    return candidates, DataLoader(TensorDataset(x, labels), 100)


class TestAccuracy:
    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel", "regression"])
    def test_accuracy_is_that_of_leave_one_out_predictions(self, task, fit_intercept):
        x, target = target_set().tensors[0], tasks()[task]
        options = {"num_classes": None, "race": False, "fit_intercept": fit_intercept}
        ranking = rank(loader=DataLoader(TensorDataset(x, target), 64), task=task, **options)
        for row in ranking.rows:
            features = good_to_bad()[row.name](x).detach()
            predictions = leave_one_out(features, target, task, fit_intercept=fit_intercept)
            assert row.accuracy == pytest.approx(metric_of(predictions, target, task), abs=1e-6), row.name
            assert row.accuracy == ranking.curves[row.name][-1].accuracy
            assert 0 < row.accuracy_stderr < 0.1

    def test_accuracy_of_many_samples_is_that_of_a_random_subset(self):
        data = target_set(3000)
        loader = DataLoader(data, 500)
        ranking = rank(loader=loader, race=False)
        order = torch.cat([portion.batch[0] for portion in Samples(loader, "multiclass", None, 0).portions(0, None)])
        chosen = mixed(index_of(torch.arange(3000))).argsort()[:SAMPLE_SIZE]
        place = {tuple(row): index for index, row in enumerate(data.tensors[0].tolist())}
        at = torch.tensor([place[tuple(row)] for row in order.tolist()])[chosen]
        for row in ranking.rows:
            predictions = leave_one_out(good_to_bad()[row.name](data.tensors[0]).detach(), data.tensors[1])
            right = (predictions.argmax(1) == data.tensors[1]).double()
            assert row.accuracy == pytest.approx(float(right[at].mean()), abs=1e-9)
            assert row.accuracy == pytest.approx(float(right.mean()), abs=4 * row.accuracy_stderr)
            expected = math.sqrt(row.accuracy * (1 - row.accuracy) / SAMPLE_SIZE)
            assert row.accuracy_stderr == pytest.approx(expected, rel=0.4)

    @pytest.mark.parametrize(
        ("task", "word", "column"),
        [("multiclass", "accuracy", "accuracy"), ("multilabel", "F1", "f1"), ("regression", "R²", "r2")],
    )
    def test_tables_name_the_metric(self, tmp_path, task, word, column):
        loader = DataLoader(TensorDataset(target_set().tensors[0], tasks()[task]), 64)
        ranking = rank(loader=loader, task=task, num_classes=None, rank_by="accuracy", race=False)
        first = ranking.rows[0]
        header, line, *_ = (re.split("  +", line.strip()) for line in str(ranking).splitlines())
        assert line[1 + header.index(word)] == f"{first.accuracy:.4f}"  # the column of positions has no header
        header, _, line, *_ = (line.split(" | ") for line in ranking.to_markdown().splitlines())
        assert line[header.index(word)] == f"{first.accuracy:.4f}"
        ranking.to_csv(tmp_path / "ranking.csv")
        with open(tmp_path / "ranking.csv", newline="") as file:
            row = next(csv.DictReader(file))
        assert float(row[column]) == first.accuracy
        assert float(row[f"{column}_stderr"]) == first.accuracy_stderr
        assert ranking.plot().axes[0].get_xlabel().startswith(f"leave-one-out {'macro ' * (word == 'F1')}{word}")

    @pytest.mark.parametrize("race", [True, False])
    def test_rank_by_decides_who_wins(self, race):
        candidates, loader = sure_or_right()
        by_logme, by_accuracy = (rank(candidates, loader, rank_by=what, race=race) for what in ("logme", "accuracy"))
        assert (by_logme.best, by_logme.tied) == ("sure", ["sure"])
        assert (by_accuracy.best, by_accuracy.tied) == ("right", ["right"])
        for ranking, others in ((by_logme, {"right", "bad"}), (by_accuracy, {"sure", "bad"})):
            assert {row.name for row in ranking.rows if row.ended == "dropped"} == (others if race else set())
        assert by_logme.scores == {row.name: row.logme for row in by_logme.rows}
        assert by_accuracy.scores == {row.name: row.accuracy for row in by_accuracy.rows}
        assert list(by_accuracy.scores) == ["right", "sure", "bad"]
        assert "accuracy is 0.0" in next(row.message for row in by_logme.rows if row.name == "right")
        expected = r"\d+\.\d standard errors behind in accuracy at 256 samples" if race else ""
        assert all(re.fullmatch(expected, row.message) for row in by_accuracy.rows[1:])

    def test_figures_show_what_ranks(self):
        candidates, loader = sure_or_right()
        ranking = rank(candidates, loader, rank_by="accuracy")
        axes = ranking.plot().axes[0]
        assert axes.get_xlabel().startswith("leave-one-out accuracy")
        assert [bar.get_width() for bar in axes.patches] == [row.accuracy for row in ranking.rows]
        axes = ranking.plot_curves().axes[0]
        assert axes.get_ylabel() == "leave-one-out accuracy"
        assert list(axes.lines[0].get_ydata()) == [point.accuracy for point in ranking.curves["right"]]

    @pytest.mark.parametrize("rank_by", ["logme", "accuracy"])
    def test_a_candidate_without_accuracy_does_not_affect_another(self, rank_by, monkeypatch):
        def fails(chosen, evidence, *args):
            return Accuracy("accuracy") if evidence.weight.shape[1] == 9 else measure(chosen, evidence, *args)

        monkeypatch.setattr("lightning_logme.ranking.collect.measure", fails)
        candidates = {"unknown": Columns(0, 9), **good_to_bad(), "also": Columns(0, 8)}
        ranking = rank(candidates, target_loader(2000), rank_by=rank_by)
        rows = {row.name: row for row in ranking.rows}
        assert rows["unknown"].ended == "finished"
        assert math.isnan(rows["unknown"].accuracy)
        assert math.isnan(rows["unknown"].accuracy_stderr)
        assert rows["bad"].ended == "dropped"
        assert "unknown" in str(ranking)
        assert ranking.page() is not None
        if rank_by == "accuracy":
            assert ranking.rows[-1].name == "unknown"
            assert ranking.tied == ["good", "also"]
            assert "unknown" not in ranking.scores

    def test_constant_features_have_the_accuracy_of_a_guess(self):
        class Constant(nn.Module):
            def forward(self, x):
                return torch.ones(len(x), 3)

        y = (torch.arange(600) % 5 == 0).long()  # one in five
        loader = DataLoader(TensorDataset(torch.randn(600, WIDTH), y), 50)
        ranking = rank({"constant": Constant(), "noise": nn.Identity()}, loader, num_classes=2, race=False)
        row = next(row for row in ranking.rows if row.name == "constant")
        assert row.accuracy == pytest.approx(0.8, abs=1e-6)
        assert row.accuracy_stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 600), rel=0.4)

    def test_the_table_of_digits_shows_that_a_sure_difference_is_small(self):
        narrow, wide = digits_features(256), digits_features(384)
        x = torch.as_tensor(np.concatenate([narrow[0], wide[0]], 1))
        loader = DataLoader(TensorDataset(x, torch.as_tensor(wide[1])), 200)
        ranking = rank({"narrow": Columns(0, 256), "wide": Columns(256, 640)}, loader, num_classes=10, race=False)
        first, second = ranking.rows
        assert (first.name, second.name, ranking.tied) == ("wide", "narrow", ["wide"])
        assert first.logme - second.logme > 5 * first.stderr
        assert abs(first.accuracy - second.accuracy) < 0.01
        remark = r"significantly behind in LogME, but accuracy is (only )?0\.00\d ± 0\.00\d (lower|higher)"
        assert re.fullmatch(remark, second.message)


class TestFailures:
    """The failure of a candidate does not affect another."""

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
            (lambda: "weights", "the factory must return a torch.nn.Module, got str"),
            (nn.Linear(3, 3), "shapes cannot be multiplied"),
            (lambda: torch.load("no such file"), "No such file"),
            (nn.Sequential(nn.Linear(WIDTH, 2), nn.Threshold(99.0, math.nan)), "the features contain NaN or Inf"),
        ],
    )
    def test_a_failed_candidate_becomes_a_failed_row(self, bad, message):
        ranking = rank({"broken": bad, **good_to_bad()})
        assert [row.name for row in ranking.rows] == ["good", "fair", "bad", "broken"]
        row = ranking.rows[-1]
        assert (row.ended, row.tied_with_best) == ("failed", False)
        assert message in row.message
        assert math.isnan(row.logme)
        assert "broken" not in ranking.scores
        assert "broken" in str(ranking)

    def test_running_out_of_memory_keeps_earlier_rounds(self):
        class Leaky(Columns):
            seen = 0

            def forward(self, x):
                Leaky.seen += len(x)
                if Leaky.seen > 300:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().forward(x)

        ranking = rank({"leaky": Leaky(0, 8), "good": Columns(0, 8)}, target_loader(2000))
        leaky = ranking.rows[-1]
        assert (leaky.name, leaky.ended, leaky.num_samples) == ("leaky", "failed", 256)
        assert "out of memory" in leaky.message
        assert leaky.logme == pytest.approx(ranking.curves["good"][0].logme)
        assert ranking.rows[0].num_samples == 2000

    def test_features_of_different_lengths_are_a_failed_row(self):
        class Ragged(nn.Module):
            calls = 0

            def forward(self, x):
                Ragged.calls += 1
                return x[:, : 8 + Ragged.calls]

        row = rank({"ragged": Ragged(), **good_to_bad()}).rows[-1]
        assert re.search(
            r"features have length 1\d, but length \d+ in earlier batches; pool them to one length", row.message
        )

    def test_constant_features_are_ranked_with_a_message(self):
        class Constant(nn.Module):
            def forward(self, x):
                return torch.ones(len(x), 3)

        # It need not be the last row: a constant column acts as an intercept.
        rows = rank({"constant": Constant(), **good_to_bad()}, race=False).rows
        (row,) = (row for row in rows if row.name == "constant")
        assert row.ended == "finished"
        assert row.message == "its features are the same for every sample"

    def test_leaked_labels_have_a_message(self):
        labels = torch.arange(600) % CLASSES
        loader = DataLoader(TensorDataset(torch.randn(600, 3), labels), 600, shuffle=False)
        leaking = rank({"leak": nn.Identity()}, loader, forward=lambda model, batch: torch.eye(4)[batch[1]])
        assert "a perfect fit of 4 outputs: evidence is unbounded" in leaking.rows[0].message

    def test_an_error_is_raised_if_every_candidate_fails(self):
        with pytest.raises(RuntimeError, match="every candidate failed: a: .*cannot be multiplied.*; b: "):
            rank({"a": nn.Linear(3, 3), "b": nn.Linear(4, 4)})

    def test_ctrl_c_keeps_complete_rounds(self):
        class Patient(Columns):
            seen = 0

            def forward(self, x):
                Patient.seen += len(x)
                if Patient.seen > 700:
                    raise KeyboardInterrupt
                return super().forward(x)

        candidates = {"good": Columns(0, 8), "patient": Patient(0, 8), "last": Columns(0, 8), "bad": Columns(16, 24)}
        state = torch.get_rng_state()
        with pytest.warns(UserWarning, match="the ranking was interrupted"):
            ranking = rank(candidates, target_loader(4000))
        assert torch.equal(torch.get_rng_state(), state)
        assert {row.name: row.num_samples for row in ranking.rows} == {
            "good": 1024,
            "patient": 512,
            "last": 512,
            "bad": 256,
        }
        assert {row.ended for row in ranking.rows[:3]} == {"interrupted"}
        assert ranking.rows[3].ended == "dropped"
        assert set(ranking.tied) == {"good", "patient", "last"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("candidates", "message"),
        [
            ({}, "candidates is empty"),
            ([("a", nn.Identity()), ("a", nn.Identity())], "candidates has two entries named 'a'"),
            ({"a": "resnet50"}, r"candidates\['a'\] must be a torch.nn.Module or a callable that builds one, got str"),
            ([nn.Identity()], r"candidates must be a mapping from names \(strings\) to modules or factories"),
            ({1: nn.Identity()}, r"candidates must be a mapping from names \(strings\) .* got \(1, Identity"),
            (nn.Identity(), "candidates must be a mapping from names to modules .* got Identity"),
            (None, "candidates must be a mapping from names to modules .* got NoneType"),
        ],
    )
    def test_bad_candidates_are_an_error(self, candidates, message):
        with pytest.raises(ValueError, match=message):
            rank_backbones(candidates, target_loader(), **QUIET)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"task": "ranking"}, "task must be one of"),
            ({"head": {"god": "fc"}}, "head names 'god', but the only candidates are 'bad', 'fair', 'good'"),
            ({"transforms": {"god": None}}, "transforms names 'god'"),
            ({"pooling": "max"}, "pooling must be"),
            ({"race": "false"}, "race must be True or False, got 'false'"),
            ({"rank_by": "gain"}, "rank_by must be 'logme' or 'accuracy', got 'gain'"),
            ({"rank_by": None}, "rank_by must be 'logme' or 'accuracy', got None"),
            ({"normalize": 1}, "normalize must be True or False, got 1"),
            ({"fit_intercept": "no"}, "fit_intercept must be True or False, got 'no'"),
            ({"progress": None}, "progress must be True or False, got None"),
            ({"target": 1.5}, "target must be a key, .* got 1.5"),
            ({"target": True}, "target must be a key, .* got True"),
            ({"seed": None}, "seed must be an integer, got None"),
            ({"seed": True}, "seed must be an integer, got True"),
            ({"seed": 1.0}, "seed must be an integer, got 1.0"),
            ({"resume_from": True}, "resume_from must be the path of a folder or None, got True"),
            ({"logger": True}, "logger must be one Lightning logger or several, got True"),
            ({"head": 3}, "head must be 'auto', the dotted name of a module .* got 3"),
            ({"forward": {"good": "x"}}, "forward of 'good' must be callable or None, got 'x'"),
            ({"transforms": {"good": "x"}}, "transforms of 'good' must be callable or None, got 'x'"),
            ({"num_classes": True}, "num_classes must be a positive integer, got True"),
            ({"task": "binary"}, "num_classes must be 2 or None for task='binary', got 4"),
            ({"task": "regression"}, "num_classes=4 has no meaning for task='regression'"),
            ({"num_classes": 0}, "num_classes must be a positive integer"),
            ({"num_classes": 2}, "target holds labels from 0 to 3"),
            ({"target": 7}, "target=7 does not lead to labels"),
            ({"task": "multilabel"}, "target must have shape"),
        ],
    )
    def test_bad_options_are_an_error(self, options, message):
        with pytest.raises(ValueError, match=message):
            rank(**options)

    @pytest.mark.parametrize("options", [{"race": "false"}, {"target": 1.5}, {"num_classes": "4"}, {"seed": "0"}])
    def test_options_are_checked_before_any_batch_is_read(self, options):
        def batches():
            raise AssertionError("a batch was read")
            yield

        class Batches:
            __iter__ = staticmethod(batches)

        with pytest.raises(ValueError, match="must be"):
            rank(loader=Batches(), **options)

    def test_options_can_be_numpy_integers(self):
        assert rank(num_classes=np.int64(4), seed=np.int64(0)).scores == rank().scores

    def test_too_few_samples_are_an_error(self):
        with pytest.raises(ValueError, match="dataloader has 12 samples, and error bars need at least 16"):
            rank(loader=target_loader(12))

    def test_classes_are_counted_in_the_labels_of_the_data_set(self):
        assert rank(num_classes=None).scores == pytest.approx(rank().scores)
        with pytest.raises(ValueError, match="num_classes is needed for task='multiclass': pass the number of classes"):
            rank(loader=list(target_loader()), num_classes=None)
        floats = TensorDataset(target_set().tensors[0], target_set().tensors[1].float())
        with pytest.raises(ValueError, match="target must hold integer class labels"):
            rank(loader=DataLoader(floats, 50), num_classes=None)

    @pytest.mark.parametrize("loader", [7, None])
    def test_an_argument_that_is_no_loader_is_an_error(self, loader):
        with pytest.raises(ValueError, match="dataloader must be a DataLoader or another iterable of batches, got"):
            rank_backbones(good_to_bad(), loader, **QUIET)

    def test_batches_without_labels_are_an_error(self):
        loader = DataLoader(TensorDataset(target_set().tensors[0]), 50)
        with pytest.raises(ValueError, match="no labels found"):
            rank(loader=loader)


class TestLoggers:
    def test_tensorboard_gets_curves_table_and_plots(self, tmp_path):
        logger = TensorBoardLogger(tmp_path, "", "")
        ranking = rank({**good_to_bad(), "with space": Columns(1, 9)}, target_loader(2000), logger=logger)
        seen = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
        for name, tag in (("good", "good"), ("bad", "bad"), ("with space", "with_space")):
            curve = ranking.curves[name]
            assert [event.step for event in seen.Scalars(f"gain/{tag}")] == [point.num_samples for point in curve]
            for what in ("logme", "accuracy"):
                values = [event.value for event in seen.Scalars(f"{what}/{tag}")]
                assert values == pytest.approx([getattr(point, what) for point in curve])
        assert seen.Tags()["images"] == ["ranking"]
        assert seen.Images("ranking")[0].width > 1000
        table = seen.Tensors("ranking/text_summary")[0].tensor_proto.string_val[0].decode()
        assert table == ranking.to_markdown()
        layout = seen.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
        assert b"gain/with_space" in layout

    def test_a_logger_of_numbers_gets_the_curves(self, tmp_path):
        logger = CSVLogger(tmp_path, "", "")
        ranking = rank(logger=[logger])
        with open(tmp_path / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        values = [float(row["gain/good"]) for row in rows if row["gain/good"]]
        assert values == pytest.approx([point.gain for point in ranking.curves["good"]])

    def test_a_logger_that_fails_does_not_end_the_ranking(self, tmp_path):
        class Down(CSVLogger):
            def log_metrics(self, metrics, step=None):
                raise ConnectionError("no route")

            def save(self):
                raise ConnectionError("no route")

        with pytest.warns(UserWarning, match="^rank_backbones: Down.log_metrics failed; .*ConnectionError: no route"):
            assert rank(logger=Down(tmp_path)).best == "good"

    def test_progress_names_dropped_candidates(self, capfd):
        rank(loader=target_loader(2000), progress=True)
        assert "bad is dropped: " in capfd.readouterr().out
