import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# The folders of the helper modules, also for processes that tests launch. There, Python runs site/sitecustomize.py.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent / "site")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), *sys.path[-2:], os.environ.get("PYTHONPATH")))
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
import torchvision_operators  # noqa: F401
from spawned import Processes

pytest.register_assert_rewrite("witness")
torch.set_num_threads(1)  # the matrices are small: a second thread would only wait for the first


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Groups of processes that are connected by gloo. A group runs one function at a time."""
    started = Processes()
    yield started
    started.close()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt. Shells prevent this in background jobs, as does Lightning after a Ctrl-C."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
