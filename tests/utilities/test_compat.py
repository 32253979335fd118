"""`lightning` and `pytorch_lightning`: ours works with the one that is in use, and leaves both as they were."""

import os
import subprocess
import sys

import pytest

RUN = """
import importlib, logging, sys, warnings

*first, package = sys.argv[1].split()
for name in first:
    importlib.import_module(name)
pl = importlib.import_module(package)

import torch
import lightning_utilities.core.rank_zero as shared
from torch.utils.data import DataLoader, TensorDataset

logger, messages = logging.getLogger(package), []
logger.addHandler(logging.Handler())
logger.handlers[-1].emit = lambda record: messages.append(record.getMessage())


def state():
    loggers = [logging.root, *(logging.getLogger(name) for name in known)]
    settings = [(one.name, one.level, one.propagate, one.disabled, list(one.handlers)) for one in loggers]
    return shared.log, shared.rank_zero_deprecation_category, list(warnings.filters), settings


known, modules = sorted(logging.root.manager.loggerDict), set(sys.modules)
before = state()
import lightning_logme

assert state() == before
assert shared.log.name == f"{package}.utilities.rank_zero", shared.log.name
packages = ({name.split(".")[0] for name in names} for names in (modules, sys.modules))
assert not {"lightning", "pytorch_lightning"} & set.symmetric_difference(*packages)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))

    def validation_step(self, batch, batch_idx):
        self.model(batch[0])


def validate(callbacks):
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=callbacks, **options)
    trainer.validate(Net(), DataLoader(TensorDataset(torch.randn(30, 6), torch.arange(30) % 3), 10), verbose=False)
    assert "logme" in trainer.callback_metrics, trainer.callback_metrics


validate(lightning_logme.LogMECallback())
assert any(message.startswith("GPU available") for message in messages), messages
assert any(message.startswith("LogMECallback: the feature is") for message in messages), messages
messages.clear()
logger.setLevel(logging.ERROR)
validate([lightning_logme.LogMECallback()])
assert messages == [], messages
"""


@pytest.mark.parametrize(
    "imported",
    [
        "lightning.pytorch",
        "pytorch_lightning",
        "lightning_logme lightning.pytorch",
        "lightning_logme pytorch_lightning",
        "lightning.pytorch pytorch_lightning",
        "pytorch_lightning lightning.pytorch",
    ],
)
def test_an_import_leaves_the_logs_of_lightning_as_they_were(tmp_path, imported):
    """The Trainer of the last package takes the callback, and its logger gets the messages and silences them."""
    pytest.importorskip("pytorch_lightning")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUN, imported]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
