"""Measurements of speed, memory and quality: ``python -m tests.benchmarks``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "site"))
import torchvision_operators  # noqa: F401
