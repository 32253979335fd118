"""The package works with `lightning` or `pytorch_lightning`, whichever is in use, and leaves both as they were."""

import json
import os
import subprocess
import sys

import pytest

RUN = """
import importlib, json, logging, sys, warnings

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


def packages():
    return {"lightning", "pytorch_lightning"} & {name.split(".")[0] for name in sys.modules}


known, before_import = sorted(logging.root.manager.loggerDict), packages()
before = state()
import lightning_logme

report = {"is unchanged": state() == before, "log": shared.log.name, "imports none": packages() == before_import}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))

    def validation_step(self, batch, batch_idx):
        self.model(batch[0])


def validate(callbacks):
    messages.clear()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=callbacks, **options)
    trainer.validate(Net(), DataLoader(TensorDataset(torch.randn(30, 6), torch.arange(30) % 3), 10), verbose=False)
    return sorted(trainer.callback_metrics), list(messages)


report["validation"] = validate(lightning_logme.LogMECallback())
logger.setLevel(logging.ERROR)
report["silent validation"] = validate([lightning_logme.LogMECallback()])
print(json.dumps(report))
"""


@pytest.mark.slow
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
def test_an_import_leaves_the_logs_of_lightning_unchanged(tmp_path, imported):
    """The Trainer of the package imported last accepts the callback. Its logger gets or silences the messages."""
    pytest.importorskip("pytorch_lightning")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUN, imported]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["is unchanged"]
    assert report["imports none"]
    assert report["log"] == f"{imported.split()[-1]}.utilities.rank_zero"
    metrics, messages = report["validation"]
    assert "logme" in metrics
    assert any(message.startswith("GPU available") for message in messages)
    assert any(message.startswith("LogMECallback: the feature is") for message in messages)
    metrics, messages = report["silent validation"]
    assert "logme" in metrics
    assert messages == []
