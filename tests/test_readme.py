"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from models import Classifier, ConvNet, images, loader
from torch.utils.data import TensorDataset

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = images()
    (tmp_path / "runs/checkpoints").mkdir(parents=True)
    for epoch in range(2):
        torch.save({"state_dict": Classifier(ConvNet()).state_dict()}, tmp_path / f"runs/checkpoints/{epoch}.ckpt")
    names = {
        "model": Classifier(ConvNet()),
        "train_loader": loader(data),
        "val_loader": loader(data),
        "news_loader": loader(data),
        "mood_loader": loader(TensorDataset(data.tensors[0], torch.randn(len(data)))),
        "target_loader": loader(data),
        "small_model": ConvNet(),
        "make_large": ConvNet,
        "batches": [(torch.randn(40, 512), torch.arange(40) % 10) for _ in range(3)],
    }
    if "LogMECallback" in code and "import" not in code:
        code = f"from lightning_logme import LogMECallback\n{code}"
    exec(code, names)


def test_pictures_and_commands_exist():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?:examples|tests)/[^)]+|[A-Z]+\.md)\)", text):
        assert (README.parent / path).is_file(), path
    for script in re.findall(r"python ((?:examples|tests)/\S+\.py)", text):
        assert (README.parent / script).is_file(), script


def test_promises_name_their_tests():
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)::(test_\w+)`", text)
    assert len(named) > 50
    for file, test in named:
        source = next(Path(__file__).parent.rglob(f"test_{file}.py")).read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{file}::{test}"
    section = text.split("## What is promised")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| ") and "shown by" not in line:
            assert "::test_" in line, line
