"""Entry point of ``python -m lightning_logme``."""

import sys

from lightning_logme.cli import main

if __name__ == "__main__":
    sys.exit(main())
