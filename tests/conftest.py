import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# The folders of the helper modules, also for the processes that tests launch. Python runs the sitecustomize.py in one.
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
torch.set_num_threads(1)  # small matrices: a second thread only waits for the first


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Groups of processes that are connected by gloo. They run one function after the other."""
    started = Processes()
    yield started
    started.close()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt. A shell prevents this in background jobs, and Lightning after a Ctrl-C."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
