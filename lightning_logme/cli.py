"""The command line: ``python -m lightning_logme``, with the commands ``rank`` and ``score_checkpoints``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from lightning_logme.ranking.checkpoints import score_checkpoints
from lightning_logme.ranking.rank import rank_backbones
from lightning_logme.ranking.result import Ranking
from lightning_logme.utilities.compat import AnyDataModule, AnyLogger, Logger, rank_zero_only

_USAGE = """\
Rank backbones, or checkpoints of one network, by how well their features suit a target, without fine-tuning.

    python -m lightning_logme rank config.yaml [--option value ...]
    python -m lightning_logme score_checkpoints config.yaml [--option value ...]

config.yaml lists candidates and a LightningDataModule, in the format of LightningCLI:

    candidates:
      small:
        class_path: my_project.SmallNet          # a torch.nn.Module
        init_args: {width: 64}
      minilm:
        class_path: lightning_logme.cli.Made     # a module that any callable returns
        init_args:
          by: transformers.AutoModel.from_pretrained
          arguments: {pretrained_model_name_or_path: ./all-MiniLM-L6-v2}
    head: {minilm: null}                         # minilm: score its output; default: the head's input
    data:
      class_path: my_project.MyDataModule
      init_args: {batch_size: 64}
    task: multiclass
    num_classes: 10
    output: ranking                              # folder for the table and the figures

Each option can be in the file or on the command line:

    python -m lightning_logme rank config.yaml --race false --devices 2
    python -m lightning_logme rank config.yaml --resume_from results --layers "[layer3, layer4]"
    python -m lightning_logme rank --help        # this text and all options

For score_checkpoints, config.yaml contains a module and paths instead of candidates. The rest is the same:

    module:
      class_path: my_project.MyLightningModule
      init_args: {width: 64}
    paths: runs/version_0/checkpoints            # a folder of .ckpt files, or a list of files
"""


class Made:
    """A factory that calls any callable to build a module, even one without an annotated return type.

    Args:
        by: dotted name of the callable, such as ``timm.create_model``.
        arguments: keyword arguments of the call.

    Example:
        >>> Made("torch.nn.Linear", {"in_features": 3, "out_features": 2})()
        Linear(in_features=3, out_features=2, bias=True)
    """

    def __init__(self, by: str, arguments: dict[str, Any] | None = None) -> None:
        self._call = _imported(by)
        self._arguments = arguments or {}

    def __call__(self) -> nn.Module:
        return self._call(**self._arguments)


_Factory = Callable[[], nn.Module] | Made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    if command not in ("rank", "score_checkpoints"):
        is_help = command in ("-h", "--help")
        print(_USAGE, file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else 2
    try:
        from jsonargparse import ArgumentError
    except ImportError:
        return _fail(command, "jsonargparse is not installed; run: pip install 'lightning-logme[cli]'", 2)
    try:
        options = _parse(command, arguments[1:])
    except (ArgumentError, OSError, yaml.YAMLError, ValueError) as error:
        return _fail(command, str(error), 2)
    try:
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
        _publish(_run(command, options), options.output)
    except Exception as error:  # a shell user needs the message, not a traceback
        return _fail(command, f"{type(error).__name__}: {error}", 1)
    return 0


def _parse(command: str, arguments: list[str]) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"python -m lightning_logme {command} CONFIG", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file; as the first argument, it needs no --config")
    if command == "rank":
        parser.add_argument("--candidates", type=dict[str, _Factory], required=True, help="networks, by name")
    else:
        parser.add_argument("--module", type=_Factory, required=True, help="module of the checkpoints")
        parser.add_argument("--paths", type=str | list[str], required=True, help="checkpoints, or a folder of them")
    parser.add_subclass_arguments(AnyDataModule, "data", required=True, help="data of the target task")
    parser.add_argument("--split", type=Literal["train", "val", "test"], default="train", help="loader to use")
    parser.add_argument("--output", type=Path | None, default=None, help="folder for the table and the figures")
    parser.add_subclass_arguments((Logger, AnyLogger), "logger", required=False, help="for curves and the table")
    # score_checkpoints has the same options; its candidates are paths.
    parser.add_function_arguments(rank_backbones, skip={"candidates", "dataloader", "forward", "logger"})
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
    if arguments and not arguments[0].startswith("-"):
        _check_keys(Path(arguments[0]))
        arguments = ["--config", *arguments]
    config = parser.parse_args(arguments)
    return getattr(parser, "instantiate", parser.instantiate_classes)(config)  # renamed in jsonargparse 4.49


def _run(command: str, options: Any) -> Ranking:
    own = ("config", "candidates", "module", "paths", "data", "split", "output")
    passed = {name: value for name, value in vars(options).items() if name not in own}
    data = options.data
    data.prepare_data()
    data.setup("test" if options.split == "test" else "fit")
    loader = getattr(data, f"{options.split}_dataloader")()
    if command == "rank":
        return rank_backbones(options.candidates, loader, **passed)
    return score_checkpoints(options.module(), options.paths, loader, **passed)


@rank_zero_only
def _publish(ranking: Ranking, folder: Path | None) -> None:
    print(ranking)
    if folder is None:
        return
    ranking.to_csv(folder / "ranking.csv")
    try:
        ranking.plot().savefig(folder / "scores.png", dpi=150)
        ranking.plot_curves().savefig(folder / "curves.png", dpi=150)
    except ImportError as error:
        print(f"no figures: {error}; run: pip install 'lightning-logme[plot]'", file=sys.stderr)
    print(f"written to {folder}")


def _fail(command: str, message: str, status: int) -> int:
    print(f"lightning_logme {command}: {message}", file=sys.stderr)
    return status


def _imported(name: str) -> Any:
    """Return the object that a dotted name refers to: an attribute of a module or a class."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            break
        return found
    raise ValueError(f"by={name!r} cannot be imported; give a dotted name such as timm.create_model.")


def _check_keys(path: Path) -> None:
    """Raise ``ValueError`` if a key is repeated: YAML keeps the last entry, and a candidate would be lost silently."""
    for key in _repeated(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)):
        raise ValueError(f"{path} has two entries named {key.value!r} (line {key.start_mark.line + 1}).")


def _repeated(node: Any) -> Iterator[yaml.ScalarNode]:
    """Yield each key that occurs a second time in its mapping, at any depth."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                yield key
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value)
