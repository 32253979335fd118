"""Python imports this file when a process that tests launch starts; see conftest.py."""

import torchvision_operators  # noqa: F401
