"""The callback in runs of a real Trainer."""

import copy
import gc
import math
import warnings
import weakref
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from models import CLASSES, Classifier, ConvNet, hooks, images, loader, mlp, penultimate, trainer, vectors
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_logme import LogMECallback
from lightning_logme.features.hooks import Capture
from lightning_logme.functional import evidence, logme
from lightning_logme.scores.accumulator import Accumulator


def test_score_and_history_are_those_of_the_input_of_the_head(tmp_path):
    module, callback = Classifier(), LogMECallback()
    run = trainer(tmp_path, callback)
    run.validate(module, loader(), verbose=False)
    expected = evidence(*penultimate(module, "model.2", vectors()))
    assert float(run.callback_metrics["logme"]) == pytest.approx(float(expected.score), rel=1e-6)
    assert float(run.callback_metrics["logme_gain"]) == pytest.approx(float(expected.gain), rel=1e-6)
    (row,), accuracy = callback.history, callback.accuracies["logme"]
    assert row == {
        "epoch": 0,
        "global_step": 0,
        "key": "logme",
        # Layers in float32 round differently for batches of another size.
        "logme": pytest.approx(float(expected.score), rel=1e-6),
        "gain": pytest.approx(float(expected.gain), rel=1e-6),
        "num_samples": 96,
        "stage": "validate",
        "accuracy": pytest.approx(accuracy.value),
        "accuracy_stderr": pytest.approx(accuracy.stderr),
    }
    assert 0 < accuracy.stderr < 0.1
    assert {name: type(value) for name, value in row.items()} == {
        "epoch": int,
        "global_step": int,
        "key": str,
        "logme": float,
        "gain": float,
        "num_samples": int,
        "stage": str,
        "accuracy": float,
        "accuracy_stderr": float,
    }
    torch.testing.assert_close(callback.evidence["logme"].weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_fit_scores_every_epoch_with_the_weights_of_that_epoch(tmp_path):
    class Witness(pl.Callback):
        def __init__(self) -> None:
            self.scores: list[float] = []

        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.scores.append(float(logme(*penultimate(pl_module, "model.2", vectors()))))

    witness, callback = Witness(), LogMECallback()
    run = trainer(tmp_path, witness, callback, max_epochs=3)
    run.fit(Classifier(), loader(shuffle=True), loader())
    assert [row["epoch"] for row in callback.history] == [0, 1, 2]
    assert [row["global_step"] for row in callback.history] == [5, 10, 15]
    assert [row["logme"] for row in callback.history] == pytest.approx(witness.scores, rel=1e-6)
    assert len(set(witness.scores)) == 3


def test_monitors_see_the_score_in_the_same_epoch(tmp_path):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "logme"}}

    checkpoint = ModelCheckpoint(tmp_path, monitor="logme", mode="max", save_top_k=-1, filename="{epoch}-{logme:.6f}")
    stopping = EarlyStopping(monitor="logme", mode="max", patience=1, strict=True)
    callback = LogMECallback()
    run = trainer(tmp_path, checkpoint, stopping, callback, max_epochs=4)  # monitors before the callback
    module = Scheduled(lr=1e-12)  # The weights do not change, so the second epoch is no better.
    run.fit(module, loader(), loader())
    assert run.current_epoch == 2
    assert stopping.stopped_epoch == 1
    assert float(stopping.best_score) == pytest.approx(callback.history[0]["logme"], rel=1e-6)
    assert float(checkpoint.best_model_score) == pytest.approx(callback.history[0]["logme"], rel=1e-6)
    assert run.lr_scheduler_configs[0].scheduler.num_bad_epochs == 0
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-13)


def test_every_validation_of_an_epoch_is_scored(tmp_path):
    callback = LogMECallback()
    run = trainer(tmp_path, callback, max_epochs=1, val_check_interval=0.4)
    run.fit(Classifier(), loader(), loader())
    assert [(row["epoch"], row["global_step"]) for row in callback.history] == [(0, 2), (0, 4)]


def test_each_loader_is_scored(tmp_path):
    callback, module = LogMECallback(layers=["model.0"]), Classifier()
    run = trainer(tmp_path, callback)
    other = vectors(60, seed=5)
    run.validate(module, [loader(), loader(other)], verbose=False)
    for index, data in enumerate((vectors(), other)):
        features, labels = penultimate(module, "model.2", data)
        assert float(run.callback_metrics[f"logme/dataloader_idx_{index}"]) == pytest.approx(
            float(logme(features, labels)), rel=1e-6
        )
        assert f"logme_gain/dataloader_idx_{index}" in run.callback_metrics
        assert f"logme/model.0/dataloader_idx_{index}" in run.callback_metrics
        assert callback.evidence[f"logme/dataloader_idx_{index}"].num_samples == len(data)
    assert "logme" not in run.callback_metrics


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_loaders_may_have_different_numbers_of_targets(tmp_path, task):
    class Encoding(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    x, y = vectors().tensors
    targets = [(y[:, None] > torch.arange(columns)).float() for columns in (1, 3)]
    callback, module = LogMECallback(task=task, curve=True), Encoding()
    sets = [TensorDataset(x, target) for target in targets]
    trainer(tmp_path, callback).validate(module, [loader(data) for data in sets], verbose=False)
    for row, data in zip(callback.history, sets, strict=True):
        assert row["logme"] == pytest.approx(float(logme(*penultimate(module, "model.2", data), task)), rel=1e-6)


def test_layers_are_scored_by_their_output(tmp_path):
    callback, module = LogMECallback(layers=["model.features", "model.features.1"]), Classifier(ConvNet())
    run = trainer(tmp_path, callback)
    data = images()
    run.validate(module, loader(data), verbose=False)
    x, labels = data.tensors
    module.eval()
    with torch.no_grad():
        norm = module.model.features[1](module.model.features[0](x))
        expected = {"model.features": norm.relu().mean((2, 3)), "model.features.1": norm.mean((2, 3))}
    for layer, features in expected.items():
        assert float(run.callback_metrics[f"logme/{layer}"]) == pytest.approx(float(logme(features, labels)), rel=1e-4)
        assert f"logme_gain/{layer}" in run.callback_metrics
    assert {row["key"] for row in callback.history} == {"logme", "logme/model.features", "logme/model.features.1"}


def test_layers_are_scored_without_a_head(tmp_path):
    class Encoder(Classifier):
        def validation_step(self, batch, batch_idx):
            self.model(batch[0])

    module = Encoder(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    callback = LogMECallback(layers=["model"], num_classes=CLASSES)
    run = trainer(tmp_path, callback)
    run.validate(module, loader(images()), verbose=False)
    assert set(run.callback_metrics) == {"logme/model", "logme_gain/model", "logme_accuracy/model"}


@pytest.mark.parametrize(
    ("task", "outputs", "loss", "convert"),
    [
        ("binary", 1, nn.functional.binary_cross_entropy_with_logits, lambda y: (y[:, None] % 2).float()),
        ("binary", 2, nn.functional.cross_entropy, lambda y: y % 2),
        ("multilabel", 3, nn.functional.binary_cross_entropy_with_logits, lambda y: torch.eye(4)[y][:, :3]),
        ("regression", 1, nn.functional.mse_loss, lambda y: y[:, None].float()),
        ("regression", 2, nn.functional.mse_loss, lambda y: torch.stack([y, -y], 1).float()),
    ],
)
def test_every_task_is_scored(tmp_path, task, outputs, loss, convert):
    x, y = vectors().tensors
    data = TensorDataset(x, convert(y))
    module, callback = Classifier(mlp(16, outputs), loss), LogMECallback(task=task)
    run = trainer(tmp_path, callback)
    run.fit(module, loader(data), loader(data))
    features, target = penultimate(module, "model.2", data)
    target = target[:, 0].long() if task == "binary" and target.ndim == 2 else target
    assert callback.history[-1]["logme"] == pytest.approx(float(logme(features, target, task)), rel=1e-6)


def test_options_reach_the_score(tmp_path):
    class Smoothed(Classifier):
        def validation_step(self, batch, batch_idx):
            self.model(batch["image"])

    x, y = vectors().tensors
    y = torch.where(torch.arange(len(y)) % 5 == 0, -100, y)
    batches = [{"image": a, "info": {"kind": b}} for a, b in zip(x.split(20), y.split(20), strict=True)]
    module = Smoothed()
    callback = LogMECallback(
        head="model.0",
        name="input",
        target=lambda batch: batch["info"]["kind"],
        fit_intercept=True,
        pooling=lambda features: features[:, :5],
    )
    run = trainer(tmp_path, callback)
    run.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    expected = logme(x[:, :5], y, ignore_index=-100, fit_intercept=True)
    assert float(run.callback_metrics["input"]) == pytest.approx(float(expected), rel=1e-6)
    assert callback.history[0]["num_samples"] == int((y != -100).sum())


def test_regression_ignores_no_value(tmp_path):
    x, y = vectors().tensors
    data = TensorDataset(x, torch.where(y == 0, -100.0, y.float())[:, None])
    callback = LogMECallback(task="regression")
    run = trainer(tmp_path, callback)
    run.validate(Classifier(mlp(16, 1), nn.functional.mse_loss), loader(data), verbose=False)
    assert callback.history[0]["num_samples"] == len(data)


def test_labels_that_validation_step_removes_from_the_batch_are_found(tmp_path, caplog):
    class Popping(Classifier):
        def validation_step(self, batch, batch_idx):
            labels = batch.pop("labels")
            self.log("val_loss", self.loss(self(batch["x"]), labels))

    x, y = vectors().tensors
    batches = [{"x": a, "labels": b} for a, b in zip(x.split(20), y.split(20), strict=True)]
    callback = LogMECallback()
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback).validate(Popping(), DataLoader(batches, batch_size=None), verbose=False)
    assert "the labels are batch['labels']." in caplog.text
    assert callback.history[0]["num_samples"] == 96


def test_later_writes_to_labels_and_features_change_nothing(tmp_path):
    """The step replaces -100 in the labels and scales the features in place, as users do."""

    class Writing(Classifier):
        def validation_step(self, batch, batch_idx):
            features = self.model[:2](batch[0])
            self.model[2](features)
            features.div_(features.norm(dim=1, keepdim=True) + 1)
            batch[1].masked_fill_(batch[1] == -100, 0)

    x, y = vectors().tensors
    data = TensorDataset(x, torch.where(torch.arange(96) % 3 == 0, -100, y))
    module, callback = Writing(), LogMECallback()
    trainer(tmp_path, callback).validate(module, loader(data), verbose=False)
    features, labels = penultimate(module, "model.2", data)
    expected = float(logme(features, labels, ignore_index=-100))
    assert callback.history[0]["num_samples"] == 64
    assert callback.history[0]["logme"] == pytest.approx(expected, rel=1e-6)


def test_features_in_reused_memory_are_copied(tmp_path):
    """With fewer samples than features, rows are held until the validation ends."""

    class Caching(Classifier):
        cache = torch.zeros(20, 50)

        def validation_step(self, batch, batch_idx):
            self.cache[: len(batch[0])] = batch[0]

    callback = LogMECallback(features=lambda module, batch: module.cache[: len(batch[0])], num_classes=CLASSES)
    x, y = vectors(40).tensors
    wide = torch.cat([x, torch.randn(40, 34)], 1)
    trainer(tmp_path, callback).validate(Caching(), loader(TensorDataset(wide, y)), verbose=False)
    assert callback.history[0]["logme"] == pytest.approx(float(logme(wide, y)), rel=1e-9)


def test_validation_step_with_dataloader_iter_is_scored(tmp_path):
    class Iterating(Classifier):
        def validation_step(self, dataloader_iter):
            (x, y), _, _ = next(dataloader_iter)
            self.log("val_loss", self.loss(self(x), y), batch_size=len(x))

    callback = LogMECallback()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`dataloader_iter`")
        trainer(tmp_path, callback).validate(Iterating(), loader(), verbose=False)
    assert callback.history[0]["num_samples"] == 96


def test_combined_loaders_are_scored_as_one(tmp_path):
    class Together(Classifier):
        def validation_step(self, batch, batch_idx):
            self(torch.cat([batch["a"][0], batch["b"][0]]))

    callback = LogMECallback(target=lambda batch: torch.cat([batch["a"][1], batch["b"][1]]))
    loaders = CombinedLoader({"a": loader(), "b": loader(vectors(seed=1))}, "min_size")
    run = trainer(tmp_path, callback)
    run.validate(Together(), loaders, verbose=False)
    assert callback.history[0]["num_samples"] == 192
    assert set(run.callback_metrics) == {"logme", "logme_gain", "logme_accuracy"}


def test_sanity_check_is_not_logged_but_finds_mistakes(tmp_path):
    callback = LogMECallback()
    run = trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=2)
    run.fit(Classifier(), loader(), loader())
    assert [row["num_samples"] for row in callback.history] == [96]
    with pytest.raises(ValueError, match="target='mood' does not lead to labels"):
        trainer(tmp_path, LogMECallback(target="mood")).fit(Classifier(), loader(), loader())


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_val_batches": 2}, {"overfit_batches": 2}])
def test_short_runs_are_scored(tmp_path, options):
    callback = LogMECallback()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You requested to overfit")
        trainer(tmp_path, callback, **options).fit(Classifier(), loader(), loader())
    assert callback.history[-1]["num_samples"] == (20 if "fast_dev_run" in options else 40)


def test_history_continues_over_validate_and_fit(tmp_path):
    module, callback = Classifier(), LogMECallback()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.validate(module, loader(), verbose=False)
    run.fit(module, loader(), loader())
    run.validate(module, loader(vectors(60, seed=3)), verbose=False)
    assert [(row["stage"], row["num_samples"]) for row in callback.history] == [
        ("validate", 96),
        ("fit", 96),
        ("validate", 60),
    ]


def test_run_without_validation_warns(tmp_path):
    with pytest.warns(UserWarning, match="logs nothing in this run: .* has no validation"):
        trainer(tmp_path, LogMECallback(), limit_val_batches=0).fit(Classifier(), loader(), loader())


def test_head_and_labels_are_reported_once(tmp_path, caplog):
    module, callback = Classifier(ConvNet()), LogMECallback()
    run = trainer(tmp_path, callback, max_epochs=1)
    with caplog.at_level("INFO"):
        run.fit(module, loader(images()), loader(images()))
        run.validate(module, loader(images()), verbose=False)
    said = [record.message for record in caplog.records if record.message.startswith("LogMECallback")]
    assert said == [
        "LogMECallback: the feature is the input of 'model.fc' (Linear), D = 8, K = 4.",
        "LogMECallback: the labels are batch[1].",
    ]


def test_pooling_and_other_possible_labels_are_reported(tmp_path, caplog):
    class Tokens(Classifier):
        def validation_step(self, batch, batch_idx):
            self.model(batch["x"][:, None].expand(-1, 3, -1))

    x, y = vectors().tensors
    batches = [{"x": a, "target": b.flip(0), "y": b} for a, b in zip(x.split(20), y.split(20), strict=True)]
    run = trainer(tmp_path, LogMECallback())
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match=r"uses batch\['target'\] .* batch\['y'\] could"):
        run.validate(Tokens(), DataLoader(batches, batch_size=None), verbose=False)
    assert (
        "the labels are batch['target']; the head 'model.2': (20, 3, 32) averaged over tokens, 32 channels"
        in caplog.text
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = trainer(tmp_path, LogMECallback(target="y"))
        run.validate(Tokens(), DataLoader(batches, batch_size=None), verbose=False)


def test_squeezed_batch_of_one_sample_is_scored(tmp_path):
    class Squeezing(Classifier):
        def validation_step(self, batch, batch_idx):
            self.model[2](self.model[:2](batch[0]).squeeze())

    callback = LogMECallback()
    trainer(tmp_path, callback).validate(Squeezing(), loader(vectors(21)), verbose=False)
    assert callback.history[0]["num_samples"] == 21


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_however_a_run_ends(tmp_path, error):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            assert hooks(self) == 2
            if error is not None:
                raise error("on purpose")
            return super().training_step(batch, batch_idx)

    module, run = Failing(), trainer(tmp_path, LogMECallback(layers=["model.0"]), max_epochs=1)
    with pytest.raises((error, SystemExit)) if error else nullcontext():
        run.fit(module, loader(), loader())
    assert hooks(module) == 0


def test_module_gets_no_new_state(tmp_path):
    class Saving(Classifier):
        def on_validation_epoch_end(self):
            assert not any("logme" in key.lower() for key in self.state_dict())

    module = Saving()
    trainer(tmp_path, LogMECallback()).fit(module, loader(), loader())
    assert module.state_dict().keys() == Saving().state_dict().keys()


class TestErrors:
    """Errors at the start raise. Later errors warn, and the run goes on."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"task": "rank"}, "task must be one of"),
            ({"pooling": "max"}, "pooling must be"),
            ({"layers": "model.0"}, r"layers must be a sequence of names, got the string 'model.0'"),
            ({"num_classes": 0}, "num_classes must be a positive integer"),
            ({"name": ""}, "name must be a non-empty string"),
            (
                {"head": nn.Identity()},
                "head must be 'auto', the dotted name .* got Identity",
            ),
            ({"head": []}, r"head must be 'auto', .* a list of names, or None for the module's output, got \[\]"),
        ],
    )
    def test_wrong_arguments_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            LogMECallback(**options)

    @pytest.mark.parametrize(
        ("callback", "model", "message"),
        [
            (
                LogMECallback("model.9"),
                None,
                "head: Untouched has no module named 'model.9'; did you mean one of 'model.2'",
            ),
            (LogMECallback(layers=["body"]), None, "layers: Untouched has no module named 'body'"),
            (LogMECallback(), nn.ModuleDict({"a": mlp(), "b": mlp()}), r"several layers .* 'model.a.2' \(32 → 4\)"),
            (LogMECallback(), nn.Conv2d(3, 4, 3), "no torch.nn.Linear"),
            (LogMECallback(), mlp(16, 1), "num_classes: .* number of outputs of 'model.2' is 1; .*task='binary'"),
            (LogMECallback("model.1"), None, "num_classes: .* outputs of 'model.1' is not known; give LogMECallback"),
        ],
    )
    @pytest.mark.parametrize("verb", ["fit", "validate"])
    def test_unsuitable_modules_raise_before_the_first_step(self, tmp_path, callback, model, message, verb):
        class Untouched(Classifier):
            def training_step(self, batch, batch_idx):
                pytest.fail("training began")

        run = trainer(tmp_path, callback, num_sanity_val_steps=0)
        with pytest.raises(ValueError, match=message):
            getattr(run, verb)(Untouched(model), *[loader()] * (2 if verb == "fit" else 1))

    @pytest.mark.parametrize(
        ("callback", "message"),
        [
            (lambda: LogMECallback(num_classes=3), r"labels from 0 to 3, .* must be in 0…2 \(3 classes\)"),
            (lambda: LogMECallback(target=0), r"target must have shape \(N,\) for task='multiclass', got \(20, 16\)"),
            (lambda: LogMECallback(target=7), "target=7 does not lead to labels in a batch that is a list of 2"),
            (lambda: LogMECallback(target=lambda b: b[1][:3]), "gave 20 features for 3 labels"),
            (lambda: LogMECallback(class_names=["a"]), "class_names must have one name for each of 4 outputs, got 1"),
            (lambda: LogMECallback(layers=["unused"]), "layer 'unused' was not called for this batch"),
            (lambda: LogMECallback(layers=["shared"]), "layer 'shared' was called 2 times for one batch"),
            (lambda: LogMECallback(task="regression"), None),
        ],
    )
    def test_unsuitable_batches_raise_on_the_first_batch(self, tmp_path, callback, message):
        class Odd(Classifier):
            def __init__(self):
                super().__init__()
                self.unused, self.shared = nn.Identity(), nn.Identity()

            def forward(self, x):
                return self.shared(self.model(self.shared(x)))

        run = trainer(tmp_path, callback())
        if message is None:  # Integer targets are accepted as numbers.
            run.validate(Odd(), loader(), verbose=False)
            return
        module = Odd()
        with pytest.raises(ValueError, match=message):
            run.validate(module, loader(), verbose=False)
        assert hooks(module) == 0

    def test_later_batches_warn_and_the_run_goes_on(self, tmp_path):
        x, y = vectors(100).tensors
        bad = torch.where(torch.arange(100) == 99, 17, y)  # only in the last batch
        callback = LogMECallback()

        class Forgiving(Classifier):
            def validation_step(self, batch, batch_idx):
                self(batch[0])

        module = Forgiving()
        checkpoint = ModelCheckpoint(tmp_path, monitor="logme", mode="max")
        run = trainer(tmp_path, callback, checkpoint)
        with pytest.warns(UserWarning, match="logme is NaN for this validation.*labels from 0 to 17") as caught:
            run.fit(module, loader(), loader(TensorDataset(x, bad)))
        assert run.state.finished
        assert sum("labels from 0 to 17" in str(warning.message) for warning in caught) == 2  # one per validation
        assert [math.isnan(row["logme"]) for row in callback.history] == [True, True]
        assert math.isnan(run.callback_metrics["logme"])
        assert callback.evidence == {}

    def test_features_are_released_after_an_error(self, tmp_path, monkeypatch):
        captures, steps, init = [], [], Capture.__init__

        def recorded(capture, *args, **options):
            init(capture, *args, **options)
            captures.append(capture)

        class CalledTwice(Classifier):
            def validation_step(self, batch, batch_idx):
                self(batch[0])
                if batch_idx == 1 and not self.trainer.sanity_checking:
                    self(batch[0])

            def training_step(self, batch, batch_idx):
                steps.append([(capture.is_open, capture.seen) for capture in captures])
                return super().training_step(batch, batch_idx)

        monkeypatch.setattr(Capture, "__init__", recorded)
        with pytest.warns(UserWarning, match="called 2 times"):
            trainer(tmp_path, LogMECallback(layers=["model.0"])).fit(CalledTwice(), loader(), loader())
        assert steps == [[(False, [])] * 2] * 10

    def test_error_in_the_evidence_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Accumulator, "decomposed", lambda *args: {}["on purpose"])
        callback = LogMECallback()
        with pytest.warns(UserWarning, match="after an error: KeyError: 'on purpose'"):
            trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)
        assert [math.isnan(row["logme"]) for row in callback.history] == [True]
        assert callback.evidence == {}

    def test_errors_keep_no_features(self, tmp_path):
        """The features are freed at once, without the garbage collector: no error is kept in its own frame."""
        seen = []

        def failing(module, batch):
            features = module.model[0](batch[0])
            if seen:
                seen.append(weakref.ref(features))
                raise OSError("out of order")
            seen.append(weakref.ref(features))
            return features

        module = Classifier()
        callback = LogMECallback(features=failing, num_classes=CLASSES, layers=["model.1"])
        gc.disable()
        try:
            with pytest.warns(UserWarning, match="after an error in batch 1: OSError: out of order"):
                trainer(tmp_path, callback).validate(module, loader(), verbose=False)
            assert [reference() for reference in seen] == [None] * 5
        finally:
            gc.enable()

    def test_nan_features_warn_and_the_run_goes_on(self, tmp_path):
        x, y = vectors(100).tensors
        x[3, 3] = math.nan
        callback = LogMECallback()
        run = trainer(tmp_path, callback)
        with pytest.warns(UserWarning, match="LogME is NaN: the features contain NaN or Inf"):
            run.fit(Classifier(), loader(), loader(TensorDataset(x, y)))
        assert run.state.finished
        assert math.isnan(callback.history[-1]["logme"])

    def test_next_validation_recovers(self, tmp_path):
        class Hiccup(Classifier):
            def validation_step(self, batch, batch_idx):
                self(batch[0])
                if batch_idx == 1 and self.current_epoch == 0 and not self.trainer.sanity_checking:
                    self(batch[0])

        callback = LogMECallback()
        with pytest.warns(UserWarning, match="called 2 times"):
            trainer(tmp_path, callback).fit(Hiccup(), loader(), loader())
        assert [math.isnan(row["logme"]) for row in callback.history] == [True, False]

    def test_empty_loader_is_nan_with_a_warning(self, tmp_path):
        class Nothing(IterableDataset):
            def __iter__(self):
                return iter(())

        callback = LogMECallback()
        with pytest.warns(UserWarning, match="logme is NaN: the validation loader gave no batch"):
            trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), loader(), DataLoader(Nothing()))
        assert math.isnan(callback.history[-1]["logme"])
        assert callback.history[-1]["num_samples"] == 0

    def test_model_compiled_and_run_before_is_nan_with_the_remedy(self, tmp_path):
        module = Classifier()
        module.compile(backend="eager")
        module.eval()
        with torch.inference_mode():
            module(vectors().tensors[0][:20])
        callback = LogMECallback()
        message = "module was called in 4 of 5 batches.* most likely first: the model was compiled .*force_eager"
        with pytest.warns(UserWarning, match=message):  # The last batch has another shape and is compiled with hooks.
            trainer(tmp_path, callback).validate(module, loader(), verbose=False)
        assert math.isnan(callback.history[0]["logme"])
        with torch.compiler.set_stance("force_eager"):  # the remedy in the message
            callback = LogMECallback()
            trainer(tmp_path, callback).validate(module, loader(), verbose=False)
        assert callback.history[0]["num_samples"] == 96


class TestSkippedForwardPasses:
    """A validation step may skip its forward pass. Batches that call no module decide nothing."""

    @staticmethod
    def module(skips):
        class Skipping(Classifier):
            def validation_step(self, batch, batch_idx):
                if not skips(self, batch_idx):
                    self(batch[0])

        return Skipping()

    def scores(self, tmp_path, skips, **options):
        callback = LogMECallback(layers=["model.0"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, callback, max_epochs=2, **options).fit(self.module(skips), loader(), loader())
        messages = [str(w.message) for w in caught if str(w.message).startswith("logme")]
        return [row for row in callback.history if row["key"] == "logme"], messages

    def test_sanity_check_without_forward_passes_changes_nothing(self, tmp_path):
        rows, messages = self.scores(tmp_path, lambda module, _: module.trainer.sanity_checking)
        assert [row["num_samples"] for row in rows] == [96, 96]
        assert messages == []

    def test_epoch_without_forward_passes_is_nan_with_the_likely_causes(self, tmp_path):
        rows, messages = self.scores(tmp_path, lambda module, _: module.current_epoch < 1)
        assert [math.isnan(row["logme"]) for row in rows] == [True, False]
        (message,) = messages
        causes = ["left out its forward pass", "averaged copy", "force_eager"]
        assert [message.index(cause) for cause in causes] == sorted(message.index(cause) for cause in causes)
        assert "logme is NaN: no scored module was called in 5 of 5 batches" in message

    def test_first_batch_is_left_out_with_a_warning(self, tmp_path):
        rows, messages = self.scores(tmp_path, lambda _, batch_idx: batch_idx == 0)
        assert [row["num_samples"] for row in rows] == [76, 76]
        assert set(messages) == {"logme: no scored module was called in 1 of 5 batches; these batches are left out."}

    def test_later_batch_makes_the_score_nan(self, tmp_path):
        """The samples of that batch would be missing."""
        rows, messages = self.scores(tmp_path, lambda _, batch_idx: batch_idx == 3)
        assert [math.isnan(row["logme"]) for row in rows] == [True, True]
        assert len(messages) == 2
        assert all("no scored module was called in this batch, unlike in earlier ones" in m for m in messages)

    def test_loader_without_forward_passes_is_nan(self, tmp_path):
        class First(Classifier):
            def validation_step(self, batch, batch_idx, dataloader_idx):
                if dataloader_idx == 0:
                    self(batch[0])

        callback = LogMECallback()
        with pytest.warns(UserWarning, match="logme is NaN: no scored module was called in 5 of 5 batches of loader 1"):
            trainer(tmp_path, callback).validate(First(), [loader(), loader()], verbose=False)
        assert [math.isnan(row["logme"]) for row in callback.history] == [False, True]

    def test_averaged_copy_is_scored_only_by_its_own_head(self, tmp_path):
        class Averaged(Classifier):
            def __init__(self):
                super().__init__()
                self.average = copy.deepcopy(self.model).requires_grad_(False)

            def validation_step(self, batch, batch_idx):
                self.average(batch[0])

        callback = LogMECallback()
        with pytest.warns(UserWarning, match="an averaged copy, or another head than 'model.2': give head="):
            trainer(tmp_path, callback).fit(Averaged(), loader(), loader())
        assert [math.isnan(row["logme"]) for row in callback.history] == [True, True]
        callback = LogMECallback(head="average.2")
        trainer(tmp_path, callback).fit(Averaged(), loader(), loader())
        assert [math.isnan(row["logme"]) for row in callback.history] == [False, False]


def test_inputs_of_several_heads_are_concatenated(tmp_path):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)
            self.head, self.head_dist = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

        def forward(self, x):
            return (self.head(self.left(x).tanh()) + self.head_dist(self.right(x).tanh())) / 2

    module, (x, y) = Classifier(TwoHeads()), vectors().tensors
    with pytest.raises(ValueError, match=r"head=\['model.head', 'model.head_dist'\]"):
        trainer(tmp_path, LogMECallback()).validate(module, loader(), verbose=False)
    callback = LogMECallback(head=["model.head", "model.head_dist"])
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    with torch.no_grad():
        features = torch.cat([module.model.left(x).tanh(), module.model.right(x).tanh()], 1)
    assert callback.history[-1]["logme"] == pytest.approx(float(logme(features, y)), rel=1e-5)


def test_head_none_scores_the_output_of_forward(tmp_path, caplog):
    module, (x, y) = Classifier(), vectors().tensors
    callback = LogMECallback(head=None, num_classes=CLASSES)
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    with torch.no_grad():
        expected = logme(module(x), y)
    assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)
    assert "the feature is the output of Classifier" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"), [({"head": "model.0"}, True), ({"head": "model.0", "num_classes": 32}, False), ({}, False)]
)
def test_head_with_more_outputs_than_classes_is_reported_once(tmp_path, caplog, options, said):
    run = trainer(tmp_path, LogMECallback(**options))
    with caplog.at_level("INFO"):
        run.fit(Classifier(), loader(), loader())
    message = "the head 'model.0' has 32 outputs, but the labels have only 4 classes (0 to 3)"
    assert caplog.text.count(message) == int(said)


def test_output_that_cannot_be_captured_is_nan_and_ends_no_forward_pass(tmp_path):
    class Cyclic(Classifier):
        def __init__(self):
            super().__init__()
            self.extra = Loop()

        def validation_step(self, batch, batch_idx):
            self(batch[0])
            self.extra(batch[0], batch_idx)

    class Loop(nn.Module):
        def forward(self, x, batch_idx):
            if batch_idx == 0:
                return x
            around = []
            around.append(around)
            return around

    callback = LogMECallback(layers=["extra"])
    run = trainer(tmp_path, callback, max_epochs=1)
    with pytest.warns(UserWarning, match="after an error in batch 1: RecursionError"):
        run.fit(Cyclic(), loader(), loader())
    scores = {row["key"]: row["logme"] for row in callback.history}
    assert math.isnan(scores["logme/extra"])
    assert math.isfinite(scores["logme"])


def test_key_that_the_module_logs_too_causes_a_warning(tmp_path):
    class Logging(Classifier):
        def on_validation_epoch_end(self):
            self.log("logme", 1.0, prog_bar=True)

    callback = LogMECallback()
    with pytest.warns(UserWarning, match="logme could not be logged: MisconfigurationException"):
        trainer(tmp_path, callback, max_epochs=1).fit(Logging(), loader(), loader())
    assert [row["num_samples"] for row in callback.history] == [96]


def test_two_callbacks_need_two_names(tmp_path):
    message = r"name: two LogMECallbacks of one Trainer log under 'logme'; .* LogMECallback\(name='logme_2'\)"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LogMECallback(), LogMECallback(layers=["model.0"]))
    run = trainer(tmp_path, LogMECallback(), LogMECallback("model.0", name="input", num_classes=4))
    run.validate(Classifier(), loader(), verbose=False)
    assert {"logme", "input", "input_gain"} <= set(run.callback_metrics)


@pytest.mark.filterwarnings("ignore:(`torch.jit|`LightningModule.to_torchscript` has been)")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_module_can_be_exported_to_torchscript_during_a_run(tmp_path, method):
    """The module is exported while its hooks are attached, and the run goes on with them."""

    class Exports(Classifier):
        exported = 0

        def on_validation_epoch_end(self):
            x = torch.randn(3, 16)
            exported = self.to_torchscript(method=method, example_inputs=x)
            torch.testing.assert_close(exported(x), self(x))
            self.exported += 1

    callback, module = LogMECallback(layers=["model.0", "model.2"]), Exports()
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(module, loader(), loader())
    assert module.exported == 4  # once in the sanity check
    assert len(callback.history) == 9
    assert all(row["num_samples"] == 96 for row in callback.history)
    assert hooks(module) == 0


@pytest.mark.parametrize("monitor", [ModelCheckpoint, EarlyStopping])
@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("logme", False),
        ("mine", True),
        ("mine_gain", True),
        ("mine_accuracy", True),
        ("mine_r2/news", True),
        ("mine_f1/dataloader_idx_1", True),
        ("mine/model.0", True),
        ("mine_gain/dataloader_idx_1", True),
        ("mine/news", True),
        ("minerals", False),
        ("mine_gains", False),
        ("mine_accuracy_of_others", False),
        ("val_loss", False),
    ],
)
def test_monitor_of_the_lowest_score_causes_a_warning(tmp_path, monitor, key, ours):
    for mode in ({}, {"mode": "min"}, {"mode": "max"}):
        callback = LogMECallback(name="mine", num_classes=4)
        run = trainer(tmp_path, callback, monitor(monitor=key, **mode))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback.setup(run, Classifier(), "fit")
        messages = [str(warning.message) for warning in caught if "treats the lowest" in str(warning.message)]
        name, wrong = monitor.__name__, ours and mode != {"mode": "max"}
        expected = f"treats the lowest {key!r} as the best, but higher is better; write {name}(monitor={key!r}, mode="
        assert messages == [f"monitor: {name} {expected}'max')."] * wrong


def test_run_warns_once_about_each_monitor(tmp_path):
    checkpoint, stopping = ModelCheckpoint(tmp_path, monitor="logme"), EarlyStopping(monitor="logme_gain")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, checkpoint, stopping, LogMECallback(), max_epochs=1)
        run.fit(Classifier(), loader(), loader())
        run.validate(Classifier(), loader(), verbose=False)
    said = [str(warning.message) for warning in caught if "treats the lowest" in str(warning.message)]
    assert [line.split()[1] for line in said] == ["EarlyStopping", "ModelCheckpoint"]
