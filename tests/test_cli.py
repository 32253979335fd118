"""The callback in LightningCLI, and the commands of ``python -m lightning_logme``."""

import csv
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from backbones import CLASSES, Columns, target_loader, target_set
from lightning.pytorch.cli import LightningCLI
from models import Classifier, loader, vectors
from torch import nn
from torch.utils.data import DataLoader

from lightning_logme import LogMECallback, rank_backbones
from lightning_logme.cli import Made, main

# Lightning uses what is deprecated in jsonargparse.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*(was deprecated in v|JSONARGPARSE_DEPRECATION_WARNINGS)")


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


class TrainData(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()


class Model(Classifier):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)


def fit(tmp_path, **options):
    callback = {"class_path": "lightning_logme.LogMECallback", "init_args": options}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer |= {"enable_progress_bar": False, "callbacks": [callback], "default_root_dir": str(tmp_path)}
    args = {"fit": {"trainer": trainer}, "subcommand": "fit"}
    return LightningCLI(Model, TrainData, args=args, save_config_callback=None, seed_everything_default=1).trainer


def test_callback_takes_options_from_a_configuration(tmp_path):
    trainer = fit(tmp_path, layers=["model.0"], target=1, pooling="mean", class_names=list("abcd"))
    assert {"logme", "logme/model.0"} <= set(trainer.callback_metrics)


def test_null_in_a_configuration_means_no_value(tmp_path):
    optional = ("layers", "features", "num_classes", "target", "ignore_index", "class_names", "probes")
    trainer = fit(tmp_path, **dict.fromkeys(optional))
    keys = {key for key in trainer.callback_metrics if key.startswith("logme")}
    assert keys == {"logme", "logme_gain", "logme_accuracy"}


@pytest.mark.parametrize("accuracy", [False, True])
def test_accuracy_can_be_turned_off_in_a_configuration(tmp_path, accuracy):
    trainer = fit(tmp_path, accuracy=accuracy)
    assert ("logme_accuracy" in trainer.callback_metrics) == accuracy


def test_number_on_the_command_line_is_an_index_of_the_batch(tmp_path):
    args = ["fit", "--trainer.callbacks+=lightning_logme.LogMECallback", "--trainer.callbacks.target=1"]
    args += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    args += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(Model, TrainData, args=args, save_config_callback=None, seed_everything_default=1)
    assert "logme" in cli.trainer.callback_metrics


class Loader(DataLoader):
    def __init__(self, n: int = 60) -> None:
        super().__init__(vectors(n), 20)


def test_callback_takes_probes_from_a_configuration(tmp_path):
    few = {"dataloader": {"class_path": "test_cli.Loader", "init_args": {"n": 50}}, "limit_batches": 2}
    probes = {
        "few": {"class_path": "lightning_logme.Probe", "init_args": few},
        "all": {"class_path": "test_cli.Loader"},
    }
    trainer = fit(tmp_path, layers=["model.*"], layer_mean=False, curve=True, probe_every=2, probes=probes)
    (logme,) = (callback for callback in trainer.callbacks if isinstance(callback, LogMECallback))
    assert {key: evidence.num_samples for key, evidence in logme.evidence.items() if key.count("/") == 1} == {
        "logme/model.0": 96,
        "logme/model.1": 96,
        "logme/model.2": 96,
        "logme/few": 40,
        "logme/all": 60,
    }


class Slice(Columns):
    def __init__(self, first: int, last: int) -> None:
        super().__init__(first, last)


class Data(pl.LightningDataModule):
    def __init__(self, n: int = 600) -> None:
        super().__init__()
        self.n = n

    def train_dataloader(self):
        return target_loader(self.n)

    def val_dataloader(self):
        return target_loader(self.n // 2)


class Scaled:
    def __init__(self, by: float = 2.0) -> None:
        self.by = by

    def __call__(self, batch: list) -> list:
        return [batch[0] * self.by, batch[1]]


def configuration(**changes):
    return {
        "candidates": {
            "good": {"class_path": "test_cli.Slice", "init_args": {"first": 0, "last": 8}},
            "bad": {"class_path": "test_cli.Slice", "init_args": {"first": 16, "last": 24}},
        },
        "data": {"class_path": "test_cli.Data"},
        "num_classes": CLASSES,
        "accelerator": "cpu",
        "progress": False,
        **changes,
    }


@pytest.fixture
def config(tmp_path):
    def write(**changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(configuration(**changes)))
        return str(path)

    return write


def test_rank_prints_the_table_and_writes_files(config, tmp_path, capsys):
    assert main(["rank", config(), "--output", str(tmp_path / "out"), "--race", "false"]) == 0
    expected = rank_backbones(
        {"good": Columns(0, 8), "bad": Columns(16, 24)},
        target_loader(),
        num_classes=CLASSES,
        race=False,
        accelerator="cpu",
        progress=False,
    )
    with open(tmp_path / "out" / "ranking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"]: float(row["logme"]) for row in rows} == expected.scores
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in ("scores.png", "curves.png"))
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("1  good")
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out'}"


@pytest.mark.parametrize("arguments", [[], ["--rank_by", "accuracy"]])
def test_rank_by_is_an_option(config, tmp_path, arguments):
    options = {"output": str(tmp_path), "race": False} | ({} if arguments else {"rank_by": "accuracy"})
    assert main(["rank", config(**options), *arguments]) == 0
    with open(tmp_path / "ranking.csv", newline="") as file:
        accuracies = {row["name"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    candidates = {"good": Columns(0, 8), "bad": Columns(16, 24)}
    loader, quiet = target_loader(), {"num_classes": CLASSES, "accelerator": "cpu", "progress": False}
    assert accuracies == rank_backbones(candidates, loader, race=False, rank_by="accuracy", **quiet).scores


def test_options_on_the_command_line_override_the_configuration(config, tmp_path, capsys):
    linear = {"by": "torch.nn.Linear", "arguments": {"in_features": 24, "out_features": 3}}
    candidates = configuration()["candidates"] | {
        "made": {"class_path": "lightning_logme.cli.Made", "init_args": linear}
    }
    path = config(
        candidates=candidates,
        split="val",
        data={"class_path": "test_cli.Data", "init_args": {"n": 1200}},
        transforms={"good": {"class_path": "test_cli.Scaled", "init_args": {"by": 3.0}}},
        logger={
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path), "name": ""},
        },
        head={"bad": None},
        race=True,
    )
    assert main(["rank", path, "--data.n", "700", "--race", "false", "--target", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in lines[1:]) == ["bad", "good", "made"]
    assert all(" 350 " in line for line in lines[1:])
    assert (tmp_path / "version_0" / "metrics.csv").is_file()


class Net(nn.Sequential):
    def __init__(self, last: int = 8) -> None:
        super().__init__(Columns(0, last), nn.Identity())


@pytest.mark.parametrize("layers", [["0", "1"], {"good": ["*"]}])
def test_rank_scores_layers(config, tmp_path, layers):
    candidates = {"good": {"class_path": "test_cli.Net"}}
    path = config(candidates=candidates, layers=layers, ignore_index=3, output=str(tmp_path), race=False)
    assert main(["rank", path, "--layer_mean", "true"]) == 0
    with open(tmp_path / "ranking.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"good", "good/0", "good/1", "good/layer_mean"}
    number = int((target_set().tensors[1] != 3).sum())
    assert {int(row["num_samples"]) for row in rows.values()} == {number}
    assert main(["rank", path, "--layers", "[]", "--ignore_index", "null"]) == 0
    with open(tmp_path / "ranking.csv", newline="") as file:
        assert [(row["name"], row["num_samples"]) for row in csv.DictReader(file)] == [("good", "600")]


@pytest.mark.slow
def test_module_can_be_run(config):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_logme", "rank", config()],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert "1  good" in done.stdout


@pytest.mark.parametrize(
    ("changes", "arguments", "status", "message"),
    [
        ({"colour": "red"}, [], 2, "colour"),
        ({}, ["--race", "maybe"], 2, "Expected a <class 'bool'>. Got value: maybe"),
        ({}, ["--layers", "low"], 2, "Expected a <class 'collections.abc.Sequence'>"),
        ({}, ["--layer_mean", "true"], 1, "ValueError: layer_mean is the mean of layers: name them"),
        ({"task": "ranking"}, [], 2, "task"),
        ({"rank_by": "gain"}, [], 2, "rank_by"),
        ({"candidates": {"a": {"class_path": "nowhere.Net"}}}, [], 2, "No module named 'nowhere'"),
        ({"data": {"class_path": "test_cli.Date"}}, [], 2, "has no attribute 'Date'"),
        ({"num_classes": 2}, [], 1, "ValueError: target holds labels from 0 to 3"),
        ({"split": "test"}, [], 1, "`test_dataloader` must be implemented"),
        ({"head": {"god": "fc"}}, [], 1, "ValueError: head names 'god'"),
    ],
)
def test_wrong_configuration_gives_a_message_and_a_status(config, capfd, changes, arguments, status, message):
    assert main(["rank", config(**changes), *arguments]) == status
    error = capfd.readouterr().err
    assert error.startswith("lightning_logme rank: ")
    assert message in error
    assert "Traceback" not in error


def test_output_must_not_be_a_file(config, tmp_path, capfd):
    (tmp_path / "taken").touch()
    assert main(["rank", config(), "--output", str(tmp_path / "taken")]) == 1
    assert "FileExistsError" in capfd.readouterr().err


def test_missing_configuration_is_an_error(tmp_path, capfd):
    assert main(["rank", str(tmp_path / "no.yaml")]) == 2
    assert "No such file" in capfd.readouterr().err


def test_duplicate_name_is_an_error(tmp_path, capfd):
    text = yaml.safe_dump(configuration()).replace("  good:", "  bad:")
    (tmp_path / "config.yaml").write_text(text)
    assert main(["rank", str(tmp_path / "config.yaml")]) == 2
    assert "has two entries named 'bad' (line 8)" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["rank", "--help"]])
def test_help_has_examples(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        sys.exit(main(arguments))
    out = capsys.readouterr().out
    assert "python -m lightning_logme rank config.yaml --race false" in out
    assert "class_path: lightning_logme.cli.Made" in out
    if arguments[0] == "rank":
        assert "drop candidates early" in out  # from the docstring of rank_backbones


def test_missing_command_shows_the_usage(capsys):
    assert main([]) == 2
    assert "python -m lightning_logme rank config.yaml" in capsys.readouterr().err


def test_made_imports_and_calls_a_function():
    assert Made("torch.nn.Linear", {"in_features": 2, "out_features": 3})().out_features == 3
    for name in ("torch.nn.Lineal", "nowhere.at.all", "torch"):
        with pytest.raises(ValueError, match=f"by='{name}' cannot be imported"):
            Made(name)
