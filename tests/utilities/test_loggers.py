"""Loggers receive the right values from a board and from a callback: TensorBoard and CSV files are read back."""

import csv
import logging
import math
import re
import sys
import warnings
from collections import deque

import pytest
import torch
from boards import events
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from models import Classifier, loader, trainer
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_logme import LogMECallback
from lightning_logme.utilities import loggers, plots
from lightning_logme.utilities.loggers import Board


def small_figure():
    return plots.gain_by_output([0.1, 0.2], 0.15, 10)


class Writer:
    def __init__(self, error=None):
        self.error, self.figures = error, []

    def add_figure(self, tag, figure, step):
        if self.error:
            raise self.error
        self.figures.append((tag, figure, step))


class WriterLogger:
    def __init__(self, error=None):
        self.experiment = Writer(error)


class BrokenLogger:
    @property
    def experiment(self):
        raise OSError("no connection")

    def log_metrics(self, values, step):
        raise OSError("no connection")

    save = None


class Clock:
    """A clock that advances only while figures are drawn."""

    def __init__(self, monkeypatch):
        self.time = 0.0
        monkeypatch.setattr(loggers, "_now", lambda: self.time)
        monkeypatch.setattr(loggers, "_costs", deque([0.1], maxlen=9))

    def draw(self, seconds=0.1):
        self.time += seconds
        return Figure()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_board_shows_everything_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, "", "")
    board = Board([logger])
    board.scalars({"gain": 0.5, "logme": 1.5}, 3)
    board.histogram("spectrum", torch.tensor([1.0, math.nan, 3.0, math.inf]), 3)
    board.histogram("nothing", torch.tensor([math.nan]), 3)
    board.figure("by output", small_figure, 3)
    board.text("ranking", "| a |")
    board.layout({"curves": {"gain": ["Multiline", ["gain"]]}})
    board.flush()
    seen = events(tmp_path)
    assert [(event.step, event.value) for event in seen.Scalars("logme")] == [(3, 1.5)]
    assert seen.Tags()["histograms"] == ["spectrum"]
    (histogram,) = seen.Histograms("spectrum")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (3, 2, 3)
    (image,) = seen.Images("by output")
    assert (image.step, image.width, image.height) == (3, 600, 450)
    assert {"ranking/text_summary", "custom_scalars__config__"} <= set(seen.Tags()["tensors"])


def test_layout_is_written_again_only_if_it_changed(tmp_path):
    board = Board([TensorBoardLogger(tmp_path, "", "")])
    for tags in (["loss"], ["loss"], ["loss", "accuracy"]):
        board.layout({"charts": {"all": ["Multiline", tags]}})
    board.flush()
    written = [event.tensor_proto.string_val[0] for event in events(tmp_path).Tensors("custom_scalars__config__")]
    assert [b"accuracy" in layout for layout in written] == [False, True]


def test_figure_is_drawn_once_for_all_loggers(tmp_path):
    drawn = []
    board = Board(
        [TensorBoardLogger(tmp_path / "a", "", ""), CSVLogger(tmp_path), TensorBoardLogger(tmp_path / "b", "", "")]
    )
    board.figure("figure", lambda: drawn.append(small_figure()) or drawn[-1], 1)
    board.flush()
    assert len(drawn) == 1
    images = [events(tmp_path / name).Images("figure") for name in "ab"]
    assert [len(image) for image in images] == [1, 1]
    assert (images[0][0].width, images[0][0].height) == (images[1][0].width, images[1][0].height)


def test_nothing_is_drawn_where_no_logger_shows_figures(tmp_path):
    csv = CSVLogger(tmp_path, "", "")
    board = Board([csv, object()], info=pytest.fail)
    board.budget(0.01)
    board.figure("figure", lambda: pytest.fail("drawn"), 1)
    board.histogram("histogram", torch.ones(3), 1)
    board.text("text", "text")
    board.layout({})
    Board([csv]).scalars({"gain": 0.5}, 1)
    Board([csv]).flush()
    assert "0.5" in (tmp_path / "metrics.csv").read_text()


def test_plots_false_leaves_out_pictures_and_layout_and_keeps_scalars_and_text(tmp_path):
    board = Board([TensorBoardLogger(tmp_path, "", "")], plots=False)
    board.figure("figure", lambda: pytest.fail("drawn"), 1)
    board.histogram("histogram", torch.ones(3), 1)
    board.layout({"charts": {"gain": ["Multiline", ["gain"]]}})
    board.scalars({"gain": 0.5}, 1)
    board.text("text", "text")
    board.flush()
    tags = events(tmp_path).Tags()
    assert tags["images"] == tags["histograms"] == []
    assert tags["scalars"] == ["gain"]
    assert tags["tensors"] == ["text/text_summary"]


def test_board_warns_once_of_loggers_that_fail_and_serves_the_others(tmp_path):
    board = Board([BrokenLogger(), TensorBoardLogger(tmp_path, "", "")], name="rank_backbones")
    with pytest.warns(UserWarning, match="rank_backbones") as caught:
        for step in range(2):
            board.scalars({"gain": 0.5}, step)
            board.figure("figure", small_figure, step)
            board.histogram("histogram", torch.ones(3), step)
        board.flush()
    messages = [str(warning.message) for warning in caught]
    assert messages == ["rank_backbones: BrokenLogger.log_metrics failed; the run goes on. OSError: no connection"]
    seen = events(tmp_path)
    assert [len(read) for read in (seen.Scalars("gain"), seen.Images("figure"), seen.Histograms("histogram"))] == [
        2
    ] * 3


def test_logger_that_fails_to_show_a_figure_gets_no_more_and_others_do():
    broken, whole = WriterLogger(OSError("disk full")), WriterLogger()
    board = Board([broken, whole])
    with pytest.warns(UserWarning, match="WriterLogger.add_figure failed; it gets no more figures. OSError: disk full"):
        board.figure("figure", Figure, 1)
    broken.experiment.error = None
    board.figure("figure", Figure, 2)
    assert [step for _, _, step in whole.experiment.figures] == [1, 2]
    assert broken.experiment.figures == []


def test_no_figures_are_drawn_after_an_error_in_drawing():
    logger = WriterLogger()
    board = Board([logger])
    with pytest.warns(UserWarning, match="LogMECallback: a figure could not be drawn.*ZeroDivisionError"):
        board.figure("figure", lambda: 1 / 0, 1)
    board.figure("figure", lambda: pytest.fail("drawn"), 2)
    assert logger.experiment.figures == []


def test_interruption_while_drawing_is_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Board([WriterLogger()]).figure("figure", interrupted, 1)


@pytest.mark.parametrize("plots", [True, "auto"])
def test_figures_are_skipped_silently_without_matplotlib(monkeypatch, plots):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = WriterLogger()
    board = Board([logger], plots, info=pytest.fail)
    board.budget(0.01)
    board.figure("figure", small_figure, 1)
    assert logger.experiment.figures == []
    with pytest.raises(ImportError):
        small_figure()


def test_names_in_other_scripts_give_no_warnings(tmp_path):
    board = Board([TensorBoardLogger(tmp_path, "", "")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        board.figure("figure", lambda: plots.gain_by_output([0.1], 0.1, 5, ["猫"]), 1)
    board.flush()
    assert [warning for warning in caught if "Glyph" in str(warning.message)] == []
    assert len(events(tmp_path).Images("figure")) == 1


def shown_in(board, logger, seconds, clock, figures=3, cost=0.1):
    """Return the number of figures that a validation of this duration shows."""
    before = len(logger.experiment.figures)
    board.budget(seconds)
    for _ in range(figures):
        board.figure("figure", lambda: clock.draw(cost), 1)
    return len(logger.experiment.figures) - before


def test_auto_draws_as_long_as_figures_take_at_most_5_percent_of_a_validation(clock):
    logger, messages = WriterLogger(), []
    board = Board([logger], info=messages.append)
    assert shown_in(board, logger, 60, clock) == 3
    assert messages == []
    assert shown_in(board, logger, 4.2, clock) == 2
    assert shown_in(board, logger, 1.2, clock) == 0
    assert shown_in(board, logger, 60, clock) == 3
    assert messages == [
        "plots: figures are left out, because drawing them (0.1 s each) would take more than 5% of this validation "
        "(4.2 s); plots=True draws them always."
    ]


def test_auto_expects_the_cost_that_was_measured(clock):
    logger = WriterLogger()
    board = Board([logger], info=lambda message: None)
    assert shown_in(board, logger, 600, clock, figures=9, cost=1.0) == 9
    assert shown_in(board, logger, 21, clock, cost=1.0) == 1
    other = WriterLogger()
    assert shown_in(Board([other], info=lambda message: None), other, 19, clock, cost=1.0) == 0


def test_slow_first_figure_of_a_process_does_not_end_the_figures(clock):
    """The first figure imports matplotlib."""
    logger = WriterLogger()
    board = Board([logger])
    assert shown_in(board, logger, 4.2, clock, figures=1, cost=3.0) == 1
    assert shown_in(board, logger, 4.2, clock, figures=1) == 1


def test_plots_true_and_a_board_without_budget_draw_always(clock):
    always, without = WriterLogger(), WriterLogger()
    assert shown_in(Board([always], plots=True, info=pytest.fail), always, 0.01, clock) == 3
    board = Board([without], info=pytest.fail)
    board.figure("figure", lambda: clock.draw(9.0))
    board.figure("figure", lambda: clock.draw(9.0))
    assert len(without.experiment.figures) == 2


def test_message_goes_to_the_log_by_default(clock, caplog):
    logger = WriterLogger()
    with caplog.at_level(logging.INFO, logger="lightning_logme"):
        assert shown_in(Board([logger]), logger, 0.5, clock) == 0
    assert [record.getMessage()[:26] for record in caplog.records] == ["plots: figures are left ou"]


def fit(tmp_path, logger, **options):
    callback = LogMECallback(**options)
    run = trainer(tmp_path, callback, logger=logger, log_every_n_steps=1)
    run.fit(Classifier(), loader(), loader())
    return callback


def test_tensorboard(tmp_path):
    callback = fit(
        tmp_path, TensorBoardLogger(tmp_path, "", ""), layers=["model.0"], class_names=list("abcd"), plots=True
    )
    seen = events(tmp_path)
    for key in ("logme", "logme/model.0"):
        rows = [row for row in callback.history if row["key"] == key]
        gain_key = key.replace("logme", "logme_gain", 1)
        assert [event.value for event in seen.Scalars(key)] == pytest.approx([row["logme"] for row in rows])
        assert [event.value for event in seen.Scalars(gain_key)] == pytest.approx([row["gain"] for row in rows])
        accuracies = seen.Scalars(key.replace("logme", "logme_accuracy", 1))
        assert [event.value for event in accuracies] == pytest.approx([row["accuracy"] for row in rows])
        steps = [event.step for event in seen.Scalars("val_loss")]
        assert [event.step for event in seen.Scalars(key)] == steps
        for tag, number in (
            (f"{key}/gain_per_output", 4),
            (f"{key}/log10_spectrum", len(callback.evidence[key].spectrum)),
        ):
            histograms = seen.Histograms(tag)
            assert [event.step for event in histograms] == steps
            assert histograms[-1].histogram_value.num == number
        gains = callback.evidence[key].per_output - callback.evidence[key].null
        assert seen.Histograms(f"{key}/gain_per_output")[-1].histogram_value.max == pytest.approx(float(gains.max()))
        spectrum = callback.evidence[key].spectrum.log10()
        assert seen.Histograms(f"{key}/log10_spectrum")[-1].histogram_value.max == pytest.approx(float(spectrum.max()))
        assert [event.step for event in seen.Images(f"{key}/gain_by_output")] == steps
    assert [event.step for event in seen.Images("logme/confusion")] == steps
    assert "logme/model.0/confusion" not in seen.Tags()["images"]


def charts(seen):
    """Return the tags of scalars in each chart of the last "Custom Scalars" layout, as TensorBoard matches them."""
    layout = Layout.FromString(seen.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    (category,) = layout.category
    tags = sorted(seen.Tags()["scalars"])
    return {
        chart.title: [tag for tag in tags if any(re.match(pattern, tag) for pattern in chart.multiline.tag)]
        for chart in category.chart
    }


class Metrics(Classifier):
    """Logs metrics whose names are similar to those of the callback, to one another and to patterns."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        for name in ("val_acc", "val_acc (top+1)", "logmetric", "not_in_loggers"):
            self.log(name, float(batch_idx), logger=not name.startswith("not"))


@pytest.mark.parametrize("endings", [[""], ["/dataloader_idx_0", "/dataloader_idx_1"]])
def test_layout_puts_scores_and_own_metrics_side_by_side(tmp_path, endings):
    callback = LogMECallback(layers=["model.0"], probes={"news": loader()})
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), log_every_n_steps=1)
    run.fit(Metrics(), loader(), [loader() for _ in endings])
    shown = charts(events(tmp_path))
    assert list(shown)[:3] == ["logme", "logme_gain", "logme_accuracy"]
    for key in ("logme", "logme_gain", "logme_accuracy"):
        sources = [f"{key}{source}{ending}" for source in ("", "/model.0") for ending in endings]
        assert shown.pop(key) == sorted([*sources, f"{key}/news", f"{key}/news/model.0"])
    validation = ("val_loss", "val_acc", "val_acc (top+1)", "logmetric")
    own = {name: [f"{name}{ending}" for ending in endings] for name in validation}
    training = {name: [name] for name in ("train_loss_step", "train_loss_epoch")}
    assert shown == own | training


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_layout_without_validation(tmp_path):
    callback = LogMECallback(probes={"news": loader()}, validation=False)
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), log_every_n_steps=1)
    run.fit(Metrics(), loader())
    shown = charts(events(tmp_path))
    assert shown["logme_gain"] == ["logme_gain/news"]
    assert shown["logme_accuracy"] == ["logme_accuracy/news"]
    assert {name for name in shown if "loss" in name} == {"train_loss_step", "train_loss_epoch"}


def test_plots_can_be_turned_off(tmp_path):
    fit(tmp_path, TensorBoardLogger(tmp_path, "", ""), plots=False)
    tags = events(tmp_path).Tags()
    assert tags["images"] == tags["histograms"] == tags["tensors"] == []
    assert {"logme", "logme_gain"} <= set(tags["scalars"])


def test_figures_that_take_longer_than_the_validation_are_left_out_by_default(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, TensorBoardLogger(tmp_path, "", ""))
    tags = events(tmp_path).Tags()
    assert tags["images"] == []
    assert "logme/gain_per_output" in tags["histograms"]
    assert len([text for text in caplog.messages if "figures are left out" in text]) == 1


def test_csv_and_several_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv", "", ""), TensorBoardLogger(tmp_path / "tb", "", "")]
    callback = fit(tmp_path, loggers, plots=True)
    with open(tmp_path / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["logme"]]
    assert [float(row["logme"]) for row in rows] == pytest.approx([row["logme"] for row in callback.history])
    assert len(events(tmp_path / "tb").Images("logme/gain_by_output")) == 2


def test_a_failing_plot_ends_the_plots_and_not_the_run(tmp_path, monkeypatch):
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(SummaryWriter, "add_figure", full)
    with pytest.warns(UserWarning, match="add_figure failed; it gets no more figures.*disk full"):
        callback = fit(tmp_path, TensorBoardLogger(tmp_path, "", ""), plots=True)
    assert len(callback.history) == 2


@pytest.mark.parametrize(("loaders", "endings"), [(1, [""]), (2, ["/dataloader_idx_0", "/dataloader_idx_1"])])
def test_progress_bar_shows_score_gain_and_accuracy_of_each_validation_loader(tmp_path, capfd, loaders, endings):
    """The values of layers and probes are logged, but not in the progress bar, which they would crowd."""
    callback = LogMECallback(layers=["model.0"], probes={"news": loader()})
    run = trainer(tmp_path, callback, enable_progress_bar=True, max_epochs=1)
    run.fit(Classifier(), loader(), [loader() for _ in range(loaders)])
    keys = {key for key in run.progress_bar_metrics if key.startswith("logme")}
    assert keys == {f"{key}{ending}" for ending in endings for key in ("logme", "logme_gain", "logme_accuracy")}
    assert {"logme/news", f"logme_gain/model.0{endings[0]}"} <= set(run.callback_metrics)
    assert "logme_gain" in capfd.readouterr().out


def test_steps_are_those_of_the_modules_own_log(tmp_path):
    """The step is `global_step` minus 1 in fit, and `global_step` in a later validate of the same Trainer."""
    callback, module = LogMECallback(), Classifier()
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), log_every_n_steps=1)
    run.fit(module, loader(), loader())
    run.validate(module, loader(), verbose=False)
    seen = events(tmp_path)
    assert [row["global_step"] for row in callback.history] == [5, 10, 10]
    for key in ("logme", "val_loss"):
        assert sorted(event.step for event in seen.Scalars(key)) == [4, 9, 10]  # two files, in any order
    assert sorted(event.step for event in seen.Histograms("logme/log10_spectrum")) == [4, 9, 10]
