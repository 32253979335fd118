"""Untrusted files run no code, and untrusted names stay plain text in their folder."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from backbones import good_to_bad, rank
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from models import Classifier, loader, trainer, vectors

from lightning_logme import LogMECallback, read_evidence, read_history, score_checkpoints

NAMES = [
    "../../outside",
    "/etc/outside",
    "a/b",
    "..",
    "~/outside",
    "C:\\outside",
    "nul\x00byte",
    "new\nline",
    "| cell | of a table |",
    "<script>alert(1)</script>",
    "[link](javascript:alert(1))",
    "$(touch outside)",
    "ü" * 300,
    " ",
]


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


HOSTILE = [*NAMES[:3], *slow(NAMES[3:])]


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """The path of a folder that exists if code was run. Checks that unpickling makes it, and that the test does not."""
    path = tmp_path / "trapped"
    pickle.loads(pickle.dumps(Runs(path)))
    assert path.exists()
    path.rmdir()
    yield path
    assert not path.exists()


@pytest.mark.parametrize("read", [read_history, read_evidence])
@pytest.mark.parametrize("legacy", [False, True])
def test_reading_a_checkpoint_runs_nothing(tmp_path, trap, read, legacy):
    state = {"history": [], "evidence": {}}
    checkpoint = {"callbacks": {"LogMECallback{'name': 'logme'}": state}, "trap": Runs(trap)}
    torch.save(checkpoint, tmp_path / "hostile.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"hostile.ckpt' cannot be read: .* could run code"):
        read(tmp_path / "hostile.ckpt")
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    torch.save(checkpoint, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"sharded.ckpt' cannot be read: .* could run code"):
        read(folder)


def test_scoring_checkpoints_runs_nothing(tmp_path, trap):
    module, good = Classifier(), tmp_path / "good.ckpt"
    torch.save(module.state_dict(), good)
    torch.save({"state_dict": module.state_dict(), "trap": Runs(trap)}, tmp_path / "hostile.ckpt")
    options = {"num_classes": 4, "accelerator": "cpu", "progress": False}
    ranking = score_checkpoints(module, [good, tmp_path / "hostile.ckpt"], loader(vectors(200)), **options)
    assert ranking.best == str(good)
    assert "UnpicklingError" in ranking.rows[-1].message


def test_resuming_runs_nothing(tmp_path, trap):
    folder = tmp_path / "moments"
    first = rank(resume_from=folder)
    files = sorted(folder.glob("*.pt"))
    assert len(files) == 3  # one for each candidate, also for the one that was dropped
    saved = torch.load(files[0], weights_only=True)
    torch.save({**saved, "trap": Runs(trap)}, files[0])
    with pytest.warns(UserWarning, match=r"starts again, because .* cannot be read"):
        again = rank(resume_from=folder)
    assert again.scores == first.scores


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04.", b"x" * 1000, "halved", "emptied", "reshaped"])
def test_a_damaged_resume_file_starts_the_ranking_anew(tmp_path, content):
    first = rank(resume_from=tmp_path)
    path = sorted(tmp_path.glob("*.pt"))[0]
    if content == "halved":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "emptied":
        torch.save({}, path)
    elif content == "reshaped":
        saved = torch.load(path, weights_only=True)
        saved["progress"]["rounds"][0]["scores"] = [1, 2]
        torch.save(saved, path)
    else:
        path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = rank(resume_from=tmp_path)
    assert again.scores == first.scores


def files_below(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", [*HOSTILE, *slow(["$x$ and $\\y$", "_hidden"])])
def test_names_of_candidates_stay_in_their_folder(tmp_path, name):
    folder = tmp_path / "deep" / "down" / "moments"
    candidates = {name: good_to_bad()["good"], "other": good_to_bad()["bad"]}
    logger = TensorBoardLogger(tmp_path / "deep" / "down" / "logs", "", "")
    first = rank(candidates, resume_from=folder, logger=logger)
    logger.finalize("success")
    assert first.best == name
    assert rank(candidates, resume_from=folder).scores == first.scores
    assert {Path(*Path(file).parts[:3]).as_posix() for file in files_below(tmp_path)} == {
        "deep/down/moments",
        "deep/down/logs",
    }
    table = first.to_markdown().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in table if line.startswith("|")}) == 1
    assert sum(line.startswith("|") for line in table) == 4  # a header, a rule, and two rows
    assert "<script>" not in first.to_markdown()
    for figure in (first.plot(), first.plot_curves()):
        figure.canvas.draw()
    assert len(first.plot_curves().axes[0].get_legend().get_texts()) == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_callbacks_and_probes_stay_in_their_folder(tmp_path, name):
    logs, saved = tmp_path / "deep" / "down" / "logs", tmp_path / "deep" / "down" / "saved"
    callback = LogMECallback(name=name, probes={name: loader(vectors(40))}, class_names=[name] * 4)
    run = trainer(
        tmp_path, callback, ModelCheckpoint(saved, filename="{epoch}"), logger=TensorBoardLogger(logs, "", "")
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LogMECallback draws no more plots")
        run.fit(Classifier(), loader(vectors(40)), loader(vectors(40)))
    assert {Path(*Path(file).parts[:3]).as_posix() for file in files_below(tmp_path)} == {
        "deep/down/logs",
        "deep/down/saved",
    }
    (path,) = saved.glob("*.ckpt")
    assert {row["key"] for row in read_history(path)} == {name, f"{name}/{name}"}
