import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Helper modules for the tests, and for the processes that tests launch. Python finds sitecustomize.py there.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent / "site")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), *sys.path[-2:], os.environ.get("PYTHONPATH")))
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
import torchvision_operators  # noqa: F401

torch.set_num_threads(1)  # small matrices: a second thread only waits for the first


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, which a shell switches off for background jobs, and Lightning after one."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
