"""Nothing but the history may grow in a run of many validations."""

import gc
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from models import Classifier, hooks, loader, trainer, vectors

import lightning_logme
from lightning_logme import LogMECallback

VALIDATIONS = 200
TRACED = 20  # the last validations: tracing all of them would take minutes
PACKAGE = str(Path(lightning_logme.__file__).parent)
ROW = 1500  # bytes that a row of the history may take, with its strings, numbers and curve
EVIDENCE = 8000  # bytes that the last evidence of a key may take, as Python numbers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")]


def allocated() -> int:
    """Return the bytes of memory that this process has allocated, in RAM or swapped out, without pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024


class Growth(pl.Callback):
    """Count after half of the validations and after all of them, and measure what the last ones left in memory."""

    def __init__(self):
        self.counted, self.allocated = [], []
        self.kept = 0
        self.validations = 0

    def on_validation_end(self, trainer, pl_module):
        self.validations += 1
        if self.validations % (VALIDATIONS // 2) == 0:
            gc.collect()
            self.allocated.append(allocated())
            self.counted.append(
                {
                    "hooks": hooks(pl_module),
                    "threads": threading.active_count(),
                    "open files": len(list(Path("/proc/self/fd").iterdir())),
                    "tensors": sum(type(thing) is torch.Tensor for thing in gc.get_objects()),
                }
            )
        if self.validations == VALIDATIONS - TRACED:
            tracemalloc.start()
        elif self.validations == VALIDATIONS:
            ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"{PACKAGE}/*")])
            tracemalloc.stop()
            self.kept = sum(statistic.size for statistic in ours.statistics("filename"))


@pytest.fixture
def _frozen() -> Iterator[None]:
    """Set aside the objects of other tests: with many objects, Python would collect the garbage of this test later."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_frozen")
@pytest.mark.parametrize("pictures", [False, True])
def test_nothing_but_the_history_grows_in_two_hundred_validations(tmp_path, pictures):
    keys = 1 if pictures else 8
    if pictures:
        callback, logger = LogMECallback(), TensorBoardLogger(tmp_path, "", "")
    else:
        probes = {"news": loader(vectors(40, seed=7))}
        callback, logger = LogMECallback(layers=["model.[01]"], layer_mean=True, curve=True, probes=probes), False
    growth = Growth()
    run = trainer(tmp_path, callback, growth, max_epochs=VALIDATIONS, logger=logger, num_sanity_val_steps=0)
    run.fit(Classifier(lr=1e-3), loader(vectors(40)), loader(vectors(40)))
    assert growth.counted[0] == growth.counted[1]
    assert len(callback.history) == VALIDATIONS * keys
    assert growth.kept < keys * (TRACED * ROW + EVIDENCE)  # the history and the last evidence
    assert growth.allocated[1] - growth.allocated[0] < 2**24 + VALIDATIONS / 2 * keys * ROW
