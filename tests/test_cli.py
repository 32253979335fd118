"""The callback in LightningCLI, which reads its options from the types of its arguments."""

import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI
from models import Classifier, loader, vectors
from torch.utils.data import DataLoader

from lightning_logme import LogMECallback

# Lightning uses what jsonargparse will drop
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*(was deprecated in v|JSONARGPARSE_DEPRECATION_WARNINGS)")


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


class Data(pl.LightningDataModule):
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
    return LightningCLI(Model, Data, args=args, save_config_callback=None, seed_everything_default=1).trainer


def test_options_from_a_configuration(tmp_path):
    trainer = fit(tmp_path, layers=["model.0"], target=1, pooling="mean", class_names=list("abcd"))
    assert {"logme", "logme/model.0"} <= set(trainer.callback_metrics)


def test_null_means_that_there_is_none(tmp_path):
    optional = ("layers", "features", "num_classes", "target", "ignore_index", "class_names", "probes")
    trainer = fit(tmp_path, **dict.fromkeys(optional))
    assert {key for key in trainer.callback_metrics if key.startswith("logme")} == {"logme", "logme_gain"}


def test_numbers_on_the_command_line_are_indices(tmp_path):
    args = ["fit", "--trainer.callbacks+=lightning_logme.LogMECallback", "--trainer.callbacks.target=1"]
    args += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    args += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(Model, Data, args=args, save_config_callback=None, seed_everything_default=1)
    assert "logme" in cli.trainer.callback_metrics


class Loader(DataLoader):
    def __init__(self, n: int = 60) -> None:
        super().__init__(vectors(n), 20)


def test_probes_in_a_configuration(tmp_path):
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
