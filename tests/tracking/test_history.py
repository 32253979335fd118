"""The history in checkpoints, and how a resumed run continues it."""

import math
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Classifier, loader, trainer, vectors

from lightning_logme import LogMECallback, read_evidence, read_history


def saving(path, **options):
    return ModelCheckpoint(path, filename="{epoch}", save_top_k=-1, **options)


@pytest.fixture
def run(tmp_path):
    """A run of three epochs, with a checkpoint after each."""
    callback, module = LogMECallback(), Classifier()
    done = trainer(tmp_path, callback, saving(tmp_path), max_epochs=3)
    done.fit(module, loader(), loader())
    return done, module, callback


def test_every_checkpoint_carries_the_history_so_far(run, tmp_path):
    _, _, callback = run
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert read_history(path) == callback.history[: epoch + 1]
    assert read_history(str(path)) == callback.history


def test_a_checkpoint_carries_the_last_evidence_as_plain_numbers(run, tmp_path):
    _, _, callback = run
    saved = read_evidence(tmp_path / "epoch=2.ckpt")["logme"]
    evidence = callback.evidence["logme"]
    assert saved["logme"] == float(evidence.score)
    assert saved["gain"] == float(evidence.gain)
    assert saved["num_samples"] == 96
    for name in ("per_output", "null", "alpha", "beta", "effective_dim", "saturated"):
        assert saved[name] == getattr(evidence, name).tolist()


def test_a_checkpoint_holds_only_plain_types(run, tmp_path):
    def check(value):
        assert type(value) in (dict, list, str, int, float, bool)
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            list(map(check, value.values()))
        elif isinstance(value, list):
            list(map(check, value))

    checkpoint = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    (state,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("LogMECallback")]
    check(state)
    assert state["history"]
    assert state["evidence"]


def test_a_checkpoint_can_be_read_without_lightning(run, tmp_path):
    code = (
        "import sys, torch\n"
        f"checkpoint = torch.load({str(tmp_path / 'epoch=2.ckpt')!r})\n"
        "assert not {'lightning', 'pytorch_lightning', 'lightning_logme'} & set(sys.modules)\n"
        "state = next(v for k, v in checkpoint['callbacks'].items() if 'LogME' in k)\n"
        "print(len(state['history']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_resume_continues_the_history(run, tmp_path):
    _, _, before = run
    callback = LogMECallback()
    again = trainer(tmp_path, callback, max_epochs=5)
    again.fit(Classifier(), loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert callback.history[:3] == before.history
    assert [row["epoch"] for row in callback.history] == [0, 1, 2, 3, 4]
    assert [row["global_step"] for row in callback.history] == [5, 10, 15, 20, 25]


def test_resuming_from_an_earlier_checkpoint_removes_later_rows(run, tmp_path):
    _, module, callback = run
    first = callback.history[0]
    trainer(tmp_path, callback, max_epochs=2).fit(module, loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [row["epoch"] for row in callback.history] == [0, 1]
    assert callback.history[0] == first


def test_validating_a_checkpoint_adds_a_row_and_loses_none(run, tmp_path):
    done, module, callback = run
    before = list(callback.history)
    done.validate(module, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert callback.history[:-1] == before
    assert callback.history[-1] == {
        **before[1],
        "stage": "validate",
        "logme": pytest.approx(before[1]["logme"], rel=1e-6),
        "gain": pytest.approx(before[1]["gain"], rel=1e-6),
        "accuracy": before[1]["accuracy"],
        "accuracy_stderr": before[1]["accuracy_stderr"],
    }


def test_validating_a_checkpoint_in_a_new_process_adds_to_its_history(run, tmp_path):
    _, _, before = run
    callback = LogMECallback()
    trainer(tmp_path, callback).validate(Classifier(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert callback.history[:-1] == before.history[:2]
    # The row says which weights were scored, not where this Trainer stands.
    assert (callback.history[-1]["epoch"], callback.history[-1]["global_step"]) == (1, 10)
    assert callback.history[-1]["logme"] == pytest.approx(before.history[1]["logme"], rel=1e-6)


def test_validating_a_checkpoint_on_several_sets_keeps_every_row(run, tmp_path):
    done, module, _ = run
    done.validate(module, loader(), verbose=False)
    done.save_checkpoint(tmp_path / "validated.ckpt")
    callback = LogMECallback()
    again = trainer(tmp_path, callback)
    for number in (40, 60):
        data = loader(vectors(number))
        again.validate(Classifier(), data, ckpt_path=tmp_path / "validated.ckpt", verbose=False)
    assert [row["num_samples"] for row in callback.history] == [96, 96, 96, 96, 40, 60]


def test_testing_a_checkpoint_leaves_the_history_unchanged(run, tmp_path):
    class Tested(Classifier):
        def test_step(self, batch, batch_idx):
            self(batch[0])

    done, _, callback = run
    before = list(callback.history)
    done.test(Tested(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert callback.history == before


def test_nan_is_saved_in_a_checkpoint_and_restored(tmp_path):
    x, y = vectors().tensors
    x[0] = math.nan
    callback = LogMECallback()
    data = loader(torch.utils.data.TensorDataset(x, y))
    run = trainer(tmp_path, callback, saving(tmp_path), max_epochs=1)
    with pytest.warns(UserWarning, match="NaN or Inf"):
        run.fit(Classifier(), loader(), data)
    (row,) = read_history(tmp_path / "epoch=0.ckpt")
    assert math.isnan(row["logme"])
    with pytest.warns(UserWarning, match="NaN or Inf"):
        run.validate(Classifier(), data, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert len(callback.history) == 2


def test_rows_of_several_callbacks_are_read(tmp_path):
    callbacks = LogMECallback(), LogMECallback("model.0", name="input", num_classes=4)
    trainer(tmp_path, *callbacks, saving(tmp_path), max_epochs=1).fit(Classifier(), loader(), loader())
    assert {row["key"] for row in read_history(tmp_path / "epoch=0.ckpt")} == {"logme", "input"}
    assert set(read_evidence(tmp_path / "epoch=0.ckpt")) == {"logme", "input"}


@pytest.mark.parametrize(
    "state",
    [
        {"history": []},
        {"history": 5, "evidence": {}},
        {"history": [1], "evidence": {}},
        {"history": [{"key": [1]}], "evidence": {}},
        {"history": [], "evidence": [1]},
    ],
)
def test_a_state_of_unknown_form_is_ignored_with_a_warning(run, tmp_path, state):
    path = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if key.startswith("LogMECallback")]
    checkpoint["callbacks"][key] = state
    torch.save(checkpoint, path)
    callback = LogMECallback()
    with pytest.warns(UserWarning, match="logme: the checkpoint holds a history in an unknown format"):
        trainer(tmp_path, callback, max_epochs=3).fit(Classifier(), loader(), loader(), ckpt_path=path)
    assert [row["epoch"] for row in callback.history] == [2]
    with pytest.raises(ValueError, match="holds no history of LogME"):
        read_history(path)


# What the callback of version 0.1 left in a checkpoint under "LogMECallback{'name': 'logme'}".
_STATE_OF_0_1 = {
    "history": [
        {
            "epoch": 0,
            "global_step": 5,
            "key": key,
            "stage": "fit",
            "logme": -0.442125,
            "gain": 0.283666,
            "num_samples": 96,
            "curve": [[32, -0.545958, 0.174343], [64, -0.513095, 0.211718], [96, -0.442125, 0.283666]],
        }
        for key in ("logme", "logme/news")
    ],
    "evidence": {
        "logme": {
            "logme": -0.442125,
            "gain": 0.283666,
            "num_samples": 96,
            "per_output": [-0.4062, -0.4408, -0.459, -0.4625],
            "null": [-0.7258, -0.7258, -0.7258, -0.7258],
            "alpha": [158.2118, 222.2829, 211.922, 216.1203],
            "beta": [11.5911, 9.8517, 9.5212, 9.4039],
            "effective_dim": [19.222, 16.4394, 16.515, 16.3373],
            "saturated": [False, False, False, False],
        }
    },
}


def test_checkpoints_of_version_0_1_are_read_and_resumed(run, tmp_path):
    path = tmp_path / "old.ckpt"
    checkpoint = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    checkpoint["callbacks"]["LogMECallback{'name': 'logme'}"] = _STATE_OF_0_1
    torch.save(checkpoint, path)
    assert read_history(path) == _STATE_OF_0_1["history"]
    assert read_evidence(path) == _STATE_OF_0_1["evidence"]
    callback = LogMECallback()
    trainer(tmp_path, callback, max_epochs=5).fit(Classifier(), loader(), loader(), ckpt_path=path)
    assert callback.history[:2] == _STATE_OF_0_1["history"]
    assert len(callback.history) > 2


def test_reading_a_checkpoint_without_history_is_an_error(tmp_path):
    run = trainer(tmp_path, saving(tmp_path, save_weights_only=True), LogMECallback(), max_epochs=1)
    run.fit(Classifier(), loader(), loader())
    with pytest.raises(ValueError, match=r"epoch=0.ckpt' holds no history of LogME; .*save_weights_only"):
        read_history(tmp_path / "epoch=0.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds no history of LogME"):
        read_evidence(tmp_path / "list.ckpt")
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path / "none.ckpt")
