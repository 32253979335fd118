"""Python imports this file at the start of the processes that tests launch; see conftest.py."""

import torchvision_operators  # noqa: F401
