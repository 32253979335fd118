"""What loggers get to see: real TensorBoard and CSV files, read back."""

import csv

import pytest
from boards import events
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from models import Classifier, loader, trainer

from lightning_logme import LogMECallback


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


def test_plots_can_be_turned_off(tmp_path):
    fit(tmp_path, TensorBoardLogger(tmp_path, "", ""), plots=False)
    tags = events(tmp_path).Tags()
    assert tags["images"] == tags["histograms"] == []
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
def test_progress_bar_shows_score_and_gain_of_each_validation_loader(tmp_path, capfd, loaders, endings):
    """The score and the gain of layers and probes are logged, and would crowd it."""
    callback = LogMECallback(layers=["model.0"], probes={"news": loader()})
    run = trainer(tmp_path, callback, enable_progress_bar=True, max_epochs=1)
    run.fit(Classifier(), loader(), [loader() for _ in range(loaders)])
    keys = {key for key in run.progress_bar_metrics if key.startswith("logme")}
    assert keys == {f"{key}{ending}" for ending in endings for key in ("logme", "logme_gain")}
    assert {"logme/news", f"logme_gain/model.0{endings[0]}"} <= set(run.callback_metrics)
    assert "logme_gain" in capfd.readouterr().out


def test_steps_are_those_of_the_modules_own_log(tmp_path):
    """One less than `global_step` in fit, and equal to it in a later validate of the same Trainer."""
    callback, module = LogMECallback(), Classifier()
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), log_every_n_steps=1)
    run.fit(module, loader(), loader())
    run.validate(module, loader(), verbose=False)
    seen = events(tmp_path)
    assert [row["global_step"] for row in callback.history] == [5, 10, 10]
    for key in ("logme", "val_loss"):
        assert sorted(event.step for event in seen.Scalars(key)) == [4, 9, 10]  # two files, in any order
    assert sorted(event.step for event in seen.Histograms("logme/log10_spectrum")) == [4, 9, 10]
