"""Runs that are interrupted or killed, and resumed."""

import copy
import os
import pickle
import signal
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from models import Classifier, hooks, loader, trainer
from spawned import CONTEXT

from lightning_logme import LogMECallback, read_history

HOOKS = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_save_checkpoint",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
]
QUICK = ("setup", "on_validation_batch_end", "on_save_checkpoint", "teardown")  # the hooks that the quick tests cover


def stop_at(hook, act, time=2):
    """Return a callback that acts in the second call of the hook, or in the first if there is only one."""
    once = "fit" in hook or "sanity" in hook or hook in ("setup", "teardown", "on_train_start", "on_train_end")
    times = 0

    def stop(self, trainer, *args, **kwargs):
        nonlocal times
        if not trainer.sanity_checking or "sanity" in hook:
            times += 1
            if times == (1 if once else time):
                act()

    return type("Stop", (pl.Callback,), {hook: stop})()


def prepared(path, stop=None, before=True, **saving):
    """Return a Trainer for three epochs, each of which writes a checkpoint, and a module. ``stop`` may stop the run."""
    torch.manual_seed(0)
    callbacks = [LogMECallback(layers=["model.0"])]
    if stop is not None:
        callbacks.insert(0 if before else 1, stop)
    saved = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1, save_last=True, **saving)
    return trainer(path, *callbacks, saved, max_epochs=3, num_sanity_val_steps=1), Classifier()


def history_of(run):
    return next(callback for callback in run.callbacks if isinstance(callback, LogMECallback)).history


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The history of a run that is not interrupted."""
    run, module = prepared(tmp_path_factory.mktemp("whole"))
    run.fit(module, loader(), loader())
    assert len(history_of(run)) == 6
    return history_of(run)


def check_resumed(path, whole):
    """Resume from the last checkpoint, or start again without one. No row may be lost or come twice."""
    last = path / "last.ckpt"
    run, module = prepared(path)
    run.fit(module, loader(), loader(), ckpt_path=last if last.exists() else None)
    assert history_of(run) == whole
    assert read_history(last) == whole


def check_unchanged(module):
    """Check that the callback left nothing in the module: no hook, no state, no object that cannot be pickled."""
    assert hooks(module) == 0
    assert set(module.state_dict()) == set(Classifier().state_dict())
    assert set(vars(module.model)) == set(vars(Classifier().model))
    copied = pickle.loads(pickle.dumps(module.model))
    torch.testing.assert_close(copied.state_dict(), module.model.state_dict())
    assert hooks(copy.deepcopy(module)) == 0


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "hook", [pytest.param(hook, marks=[] if hook in QUICK else pytest.mark.slow) for hook in HOOKS]
)
def test_ctrl_c_in_any_hook_leaves_the_module_unchanged_and_loses_no_row(tmp_path, hook, before, whole):
    run, module = prepared(tmp_path, stop_at(hook, lambda: os.kill(os.getpid(), signal.SIGINT)), before)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.fit(module, loader(), loader())
    check_unchanged(module)
    assert history_of(run) == whole[: len(history_of(run))]
    check_resumed(tmp_path, whole)


@pytest.mark.usefixtures("_interruptible")
def test_the_same_callback_can_resume_after_ctrl_c(tmp_path, whole):
    run, module = prepared(tmp_path, stop_at("on_validation_end", lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.fit(module, loader(), loader())
    callback = next(callback for callback in run.callbacks if isinstance(callback, LogMECallback))
    assert len(callback.history) == 4  # two epochs, but only the first has left a checkpoint
    again = trainer(tmp_path, callback, max_epochs=3)
    again.fit(Classifier(), loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.history == whole


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=:UserWarning")
def test_a_checkpoint_written_in_the_middle_of_a_validation_loses_only_its_row(tmp_path, whole):
    """Lightning resumes after that validation, which therefore has no row. No other row is lost or comes twice."""

    def fail():
        raise RuntimeError("a mistake of the user's own")

    stop = stop_at("on_validation_batch_end", fail, time=7)  # the second batch of the second validation
    emergency = OnExceptionCheckpoint(tmp_path, "emergency")
    run = trainer(tmp_path, LogMECallback(), stop, emergency, max_epochs=3)
    with pytest.raises(RuntimeError, match="of the user's own"):
        run.fit(Classifier(), loader(), loader())
    again = trainer(tmp_path, LogMECallback(), max_epochs=3)
    again.fit(Classifier(), loader(), loader(), ckpt_path=tmp_path / "emergency.ckpt")
    assert [row["epoch"] for row in history_of(again)] == [0, 2]


class Deadly:
    """Kills the process that pickles it."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(where, path):
    """Run, and kill this process in a hook, or while a checkpoint is pickled or moved."""
    torch.set_num_threads(1)

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_when_moved(event, arguments):
        if event in ("shutil.move", "os.rename") and str(arguments[1]).endswith("epoch=1.ckpt"):
            kill()

    stop = None
    if where == "pickled":
        stop = pl.Callback()
        stop.on_save_checkpoint = lambda trainer, module, checkpoint: checkpoint.update(
            {"deadly": Deadly()} if trainer.current_epoch == 1 else {}
        )
    elif where == "moved":
        sys.addaudithook(kill_when_moved)
    else:
        stop = stop_at(where, kill, time=7 if "batch" in where else 2)
    run, module = prepared(path, stop)
    run.fit(module, loader(), loader())


@pytest.mark.parametrize(
    "where", ["on_validation_batch_end", "on_validation_epoch_end", "pickled", "moved", "on_train_batch_end"]
)
def test_a_run_can_be_resumed_after_sigkill(tmp_path, where, whole):
    """The process is killed in a validation, while a checkpoint is made or moved into its place, or in training."""
    process = CONTEXT.Process(target=run_until_killed, args=(where, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    checkpoints = list(tmp_path.glob("*.ckpt"))
    assert checkpoints
    assert all(read_history(path) for path in checkpoints)
    check_resumed(tmp_path, whole)


def test_half_a_checkpoint_is_an_error_that_says_so(tmp_path):
    """A file system that does not move files into their place can leave half a file."""
    run, module = prepared(tmp_path)
    run.fit(module, loader(), loader())
    path = tmp_path / "epoch=1.ckpt"
    content = path.read_bytes()
    for part in (len(content) // 2, 10, 0):
        path.write_bytes(content[:part])
        with pytest.raises(ValueError, match=r"epoch=1.ckpt' cannot be read: it is not a complete checkpoint"):
            read_history(path)
