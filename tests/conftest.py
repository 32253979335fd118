import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

torch.set_num_threads(1)  # small matrices: a second thread only waits for the first


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
