"""Probes: other tasks that are scored while a module trains on its own task."""

import copy
import math
import random
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from boards import events
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from models import CLASSES, Classifier, ConvNet, hooks, images, loader, mlp, penultimate, trainer, vectors
from oracles import problem
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from tqdm.auto import tqdm

from lightning_logme import LogMECallback, Probe, read_history
from lightning_logme.functional import evidence, logme
from lightning_logme.tracking.probes import Probes


def other(n=150, classes=3, seed=7):
    return vectors(n, seed=seed, classes=classes)


def rows_of(callback, key):
    return [row for row in callback.history if row["key"] == key]


class Scores(pl.Callback):
    """Record at each validation the score from an ordinary loop over the probe's data."""

    def __init__(self, data, task="multiclass"):
        self.data, self.task, self.expected = data, task, []

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.expected.append(float(logme(*penultimate(pl_module, "model.2", self.data), self.task)))


def test_scores_are_those_of_the_features_on_the_other_task(tmp_path):
    ratings = TensorDataset(torch.randn(80, 16), torch.randn(80))
    callback = LogMECallback(
        probes={"news": loader(other(), 32), "mood": Probe(loader(ratings, 30), task="regression")}
    )
    news, mood = Scores(other()), Scores(ratings, "regression")
    run = trainer(tmp_path, callback, news, mood, max_epochs=3)
    run.fit(Classifier(), loader(shuffle=True), loader())
    for key, witness, number in (("logme/news", news, 150), ("logme/mood", mood, 80)):
        rows = rows_of(callback, key)
        assert [row["logme"] for row in rows] == pytest.approx(witness.expected, rel=1e-5)
        assert [row["num_samples"] for row in rows] == [number] * 3
        assert [row["epoch"] for row in rows] == [0, 1, 2]
        assert float(run.callback_metrics[key]) == pytest.approx(rows[-1]["logme"], rel=1e-6)
        gain_key = key.replace("logme", "logme_gain")
        assert float(run.callback_metrics[gain_key]) == pytest.approx(rows[-1]["gain"], rel=1e-6)
    assert len(rows_of(callback, "logme")) == 3
    assert callback.evidence["logme/news"].weight.shape == (3, 32)


def test_trainer_validate_runs_probes(tmp_path):
    module, callback = Classifier(), LogMECallback(probes={"news": loader(other())})
    (metrics,) = trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert metrics["logme/news"] == pytest.approx(float(logme(*penultimate(module, "model.2", other()))), rel=1e-6)


def test_probes_can_be_monitored(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="logme/news", mode="max")
    stopping = EarlyStopping("logme_gain/news", mode="max", patience=1, min_delta=10.0)
    callback = LogMECallback(probes={"news": loader(other())})
    run = trainer(tmp_path, callback, checkpoint, stopping, max_epochs=5)
    run.fit(Classifier(), loader(shuffle=True), loader())
    rows = rows_of(callback, "logme/news")
    assert len(rows) == 2  # stopped
    assert float(checkpoint.best_model_score) == pytest.approx(max(row["logme"] for row in rows), rel=1e-6)
    saved = [row for row in read_history(checkpoint.best_model_path) if row["key"] == "logme/news"]
    assert saved[-1]["logme"] == pytest.approx(float(checkpoint.best_model_score), rel=1e-6)


class Noisy(Classifier):
    """Changes in a forward pass everything that a forward pass can change."""

    def __init__(self, model=None):
        super().__init__(model or ConvNet())
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("replaced", torch.zeros(2))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.model.avgpool.eval()  # one module in a different mode from the rest

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        logits = self.model(self.dropout(x))
        if self.trainer.validating:
            self.log("norm", logits.norm())
        self.accuracy.update(logits, torch.zeros(len(x), dtype=torch.long))
        return logits


def run_of(tmp_path, probes, **options):
    pl.seed_everything(3, verbose=False)
    module = Noisy()
    seen = []

    class Witness(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes = [part.training for part in pl_module.modules()]
            seen.append((torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), modes))  # noqa: NPY002

        def on_validation_end(self, trainer, pl_module):
            seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})
            seen.append({name: value.clone() for name, value in pl_module.accuracy.metric_state.items()})
            seen.append(pl_module.accuracy.update_count)
            seen.append({key: float(value) for key, value in trainer.callback_metrics.items() if "logme" not in key})

    run = trainer(tmp_path, LogMECallback(probes=probes), Witness(), max_epochs=2, **options)
    run.fit(module, loader(images(), 16, shuffle=True), loader(images(), 16))
    seen.append({name: value.clone() for name, value in module.state_dict().items()})
    return seen


in_eval_mode = pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")  # on purpose


@in_eval_mode
def test_probes_do_not_change_the_run(tmp_path):
    data = TensorDataset(torch.randn(40, 3, 12, 12), torch.arange(40) % 3)
    test = loader(data, 16, shuffle=True)
    probes = {"news": loader(data, 16, shuffle=True), "tested": Probe(loader(data, 16), test=test)}
    without, with_probes = run_of(tmp_path, {}), run_of(tmp_path, probes)
    assert len(without) == len(with_probes) > 10
    for before, after in zip(without, with_probes, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@in_eval_mode
def test_a_failing_probe_does_not_change_weights_and_buffers(tmp_path):
    def fails(module, batch):
        module(batch[0])
        raise RuntimeError("on purpose")

    without = run_of(tmp_path, {}, num_sanity_val_steps=0)
    data = TensorDataset(torch.randn(40, 3, 12, 12), torch.arange(40) % 3)
    with pytest.warns(UserWarning, match="logme/news is NaN, after an error: RuntimeError: on purpose"):
        after = run_of(tmp_path, {"news": Probe(loader(data, 16), forward=fails)}, num_sanity_val_steps=0)
    torch.testing.assert_close(after[-1], without[-1], rtol=0, atol=0)


class TestForward:
    def test_a_custom_forward_takes_batches_of_another_form(self, tmp_path):
        class Rows(Dataset):
            def __len__(self):
                return 60

            def __getitem__(self, index):
                return {"text": other()[index][0], "score": float(index % 7), "extra": index}

        probe = Probe(
            DataLoader(Rows(), 20),
            task="regression",
            target="score",
            forward=lambda module, batch: module(batch["text"]),
        )
        callback, module = LogMECallback(probes={"mood": probe}), Classifier()
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
        data = TensorDataset(other(150)[:60][0], torch.arange(60) % 7 * 1.0)
        expected = logme(*penultimate(module, "model.2", data), "regression")
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)

    def test_mappings_are_passed_to_the_arguments_of_forward(self, tmp_path):
        class Module(Classifier):
            def forward(self, x, scale=1.0):
                return self.model(x * scale)

        class Rows(Dataset):
            def __len__(self):
                return 60

            def __getitem__(self, index):
                return {"x": other()[index][0], "labels": index % 3, "id": index}

        callback = LogMECallback(probes={"news": Probe(DataLoader(Rows(), 20), num_classes=3)})
        trainer(tmp_path, callback).validate(Module(), loader(), verbose=False)
        assert callback.history[-1]["num_samples"] == 60
        assert math.isfinite(callback.history[-1]["logme"])

    def test_limit_batches_limits_the_samples(self, tmp_path):
        callback = LogMECallback(probes={"news": Probe(loader(other(), 20), limit_batches=2)})
        trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)
        assert callback.history[-1]["num_samples"] == 40

    def test_a_stream_is_scored_up_to_its_limit(self, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(other())

        probes = {
            "all": Probe(DataLoader(Stream(), 40), num_classes=3),
            "few": Probe(DataLoader(Stream(), 40), num_classes=3, limit_batches=3),
        }
        callback, module = LogMECallback(probes=probes), Classifier()
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
        assert [row["num_samples"] for row in callback.history[1:]] == [150, 120]
        expected = logme(*penultimate(module, "model.2", other()))
        assert callback.history[1]["logme"] == pytest.approx(float(expected), rel=1e-5)

    def test_probes_run_in_the_precision_of_the_trainer(self, tmp_path):
        module, callback = Classifier(), LogMECallback(probes={"news": loader(other())})
        trainer(tmp_path, callback, precision="64-true").validate(module, loader(), verbose=False)
        expected = logme(*penultimate(module, "model.2", TensorDataset(other()[:][0].double(), other()[:][1])))
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-9)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_probes_run_in_low_precision(self, tmp_path, precision):
        module, callback = Classifier(), LogMECallback(probes={"news": loader(other())})
        expected = logme(*penultimate(module, "model.2", other()))
        trainer(tmp_path, callback, precision=precision).validate(module, loader(), verbose=False)
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), abs=0.02)
        assert callback.history[-1]["logme"] != pytest.approx(float(expected), rel=1e-7)

    def test_labels_keep_their_precision(self, tmp_path):
        """bf16 would round them to three digits."""
        data = TensorDataset(torch.randn(64, 16), torch.linspace(100, 101, 64))
        callback = LogMECallback(probes={"mood": Probe(loader(data, 16), task="regression")}, fit_intercept=True)
        trainer(tmp_path, callback, precision="bf16-true").validate(Classifier(), loader(), verbose=False)
        assert len(callback.evidence["logme/mood"].null) == 1
        variance = data.tensors[1].double().var(correction=0) * 64 / 63
        null = -0.5 * (math.log(2 * math.pi * variance) + 1)
        assert float(callback.evidence["logme/mood"].null) == pytest.approx(null, rel=1e-3)


class SelfSupervised(pl.LightningModule):
    """An autoencoder, which trains without labels."""

    def __init__(self, convolutional=False):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 8, 16), nn.Flatten()) if convolutional else mlp(16, 8)
        self.decoder = nn.ConvTranspose1d(8, 1, 16)

    def forward(self, x):
        return self.encoder(x[:, None] if isinstance(self.encoder[0], nn.Conv1d) else x)

    def training_step(self, batch, batch_idx):
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        return (self.decoder(self(x)[:, :, None])[:, 0] - x).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class SimSiam(pl.LightningModule):
    """A backbone in ``forward``, and a projector or predictor that only training uses."""

    def __init__(self, name="projector"):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.add_module(name, nn.Linear(16, 4))
        self.name = name

    def forward(self, x):
        return self.backbone(x)

    def training_step(self, batch, batch_idx):
        first, second = (self.get_submodule(self.name)(self(batch[0] + torch.randn_like(batch[0]))) for _ in range(2))
        return -nn.functional.cosine_similarity(first, second.detach()).mean()

    def validation_step(self, batch, batch_idx):
        self.log("std", self(batch[0]).std())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


UNLABELLED = TensorDataset(torch.randn(40, 16))


class TestWithoutAHead:
    def test_the_error_asks_for_layers_or_features(self, tmp_path):
        callback = LogMECallback(probes={"news": loader(other())})
        with pytest.raises(ValueError, match=r"(?s)no torch.nn.Linear.*layers=.*features=callable"):
            trainer(tmp_path, callback).fit(SelfSupervised(convolutional=True), loader(UNLABELLED), loader(UNLABELLED))

    @pytest.mark.parametrize("way", ["layers", "features"])
    def test_the_output_of_an_encoder_is_scored(self, tmp_path, way):
        options = {
            "layers": {"layers": ["encoder"]},
            "features": {"features": lambda module, batch: module.encoder(batch[0])},
        }[way]
        module = SelfSupervised()
        callback = LogMECallback(probes={"news": loader(other())}, validation=False, **options)
        run = trainer(tmp_path, callback, max_epochs=1)
        if way == "layers":
            module.encoder[0], module.encoder[2] = nn.Bilinear(16, 16, 32), nn.Bilinear(32, 32, 8)
            module.encoder.forward = lambda x: module.encoder[2](*2 * (module.encoder[0](x, x).relu(),))
        run.fit(module, loader(UNLABELLED), loader(UNLABELLED))
        with torch.no_grad():
            expected = logme(module.eval().encoder(other()[:][0]), other()[:][1])
        assert callback.history[-1]["key"] in ("logme/news", "logme/news/encoder")
        assert float(run.callback_metrics["logme/news"]) == pytest.approx(float(expected), rel=1e-5)
        assert "logme" not in run.callback_metrics

    def test_the_last_layer_takes_the_place_of_the_head(self, tmp_path):
        callback = LogMECallback(layers=["encoder.0", "encoder.1"], probes={"news": loader(other())}, validation=False)
        trainer(tmp_path, callback).validate(SelfSupervised(convolutional=True), loader(UNLABELLED), verbose=False)
        scores = {row["key"]: row["logme"] for row in callback.history}
        assert scores["logme/news"] == scores["logme/news/encoder.1"]
        assert callback.evidence["logme/news"].weight.shape == callback.evidence["logme/news/encoder.1"].weight.shape

    def test_probes_alone_need_no_labels_of_the_validation_set(self, tmp_path):
        callback = LogMECallback(layers=["encoder"], target="y", probes={"news": loader(other())}, validation=False)
        trainer(tmp_path, callback).fit(SelfSupervised(convolutional=True), loader(UNLABELLED), loader(UNLABELLED))
        assert {row["key"] for row in callback.history} == {"logme/news", "logme/news/encoder"}

    def test_features_are_scored_on_the_validation_set_too(self, tmp_path):
        module = SelfSupervised()
        callback = LogMECallback(features=lambda module, batch: module(batch[0]), num_classes=CLASSES)
        run = trainer(tmp_path, callback, max_epochs=1)
        run.fit(module, loader(), loader())
        with torch.no_grad():
            expected = logme(module.eval()(vectors()[:][0]), vectors()[:][1])
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)

    @pytest.mark.parametrize("options", [{"layers": ["encoder"]}, {"features": lambda m, b: m(b[0]), "task": "binary"}])
    @pytest.mark.parametrize("sanity", [0, 2])
    def test_a_validation_set_without_labels_is_skipped_only_on_request(self, tmp_path, options, sanity):
        data = loader(UNLABELLED)
        module = SelfSupervised(convolutional=True)
        callback = LogMECallback(probes={"news": loader(other())}, **options)
        with pytest.raises(ValueError, match="validation=False"):
            trainer(tmp_path, callback, num_sanity_val_steps=sanity).fit(module, data, data)
        module = SelfSupervised(convolutional=True)
        callback = LogMECallback(probes={"news": loader(other())}, validation=False, **options)
        run = trainer(tmp_path, callback, max_epochs=3, num_sanity_val_steps=sanity)
        run.fit(module, data, data)
        assert len(rows_of(callback, "logme/news")) == 3
        assert math.isfinite(run.callback_metrics["logme/news"])
        assert "logme" not in run.callback_metrics

    @pytest.mark.parametrize("options", [{"target": "y"}, {"num_classes": 5}, {"class_names": ["a", "b"]}])
    def test_options_about_labels_mean_that_the_validation_set_must_be_scored(self, tmp_path, options):
        callback = LogMECallback(
            features=lambda m, b: m(b[0]), task="multilabel", probes={"news": loader(other())}, **options
        )
        with pytest.raises(ValueError, match="labels|class_names|num_classes"):
            trainer(tmp_path, callback).fit(SelfSupervised(), loader(UNLABELLED), loader(UNLABELLED))

    def test_an_error_after_a_good_batch_is_nan_for_that_validation_alone(self, tmp_path):
        class Twice(Classifier):
            def validation_step(self, batch, batch_idx):
                self(batch[0])
                if batch_idx == 1 and self.current_epoch == 0:
                    self(batch[0])

        callback = LogMECallback(probes={"news": loader(other())})
        with pytest.warns(UserWarning, match="logme is NaN for this validation, after an error in batch 1"):
            trainer(tmp_path, callback, num_sanity_val_steps=0).fit(Twice(), loader(), loader())
        assert [math.isnan(row["logme"]) for row in rows_of(callback, "logme")] == [True, False]

    @pytest.mark.parametrize("name", ["projector", "predictor"])
    def test_layers_of_a_module_with_a_projector_are_scored_without_a_guessed_head(self, tmp_path, name):
        module = SimSiam(name)
        callback = LogMECallback(probes={"news": loader(other())}, layers=["backbone"], validation=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run = trainer(tmp_path, callback)
            run.fit(module, loader(UNLABELLED), loader(UNLABELLED))
        with torch.no_grad():
            expected = logme(module.eval().backbone(other()[:][0]), other()[:][1])
        for key in ("logme/news", "logme/news/backbone"):
            assert float(run.callback_metrics[key]) == pytest.approx(float(expected), rel=1e-5)
        assert {row["key"] for row in callback.history} == {"logme/news", "logme/news/backbone"}

    @pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
    @pytest.mark.parametrize("validated", [True, False])
    def test_a_predictor_mistaken_for_the_head_is_an_error_before_training(self, tmp_path, validated):
        callback = LogMECallback(probes={"news": loader(other())}, validation=False)
        message = r"probes\['news'\]: .*'predictor' was taken for the classifier head.*head=None.*features=.*forward="
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callback).fit(
                SimSiam("predictor"), loader(UNLABELLED), loader(UNLABELLED) if validated else None
            )

    def test_head_none_scores_the_output_of_forward(self, tmp_path):
        module, callback = SimSiam(), LogMECallback(head=None, probes={"news": loader(other())}, validation=False)
        trainer(tmp_path, callback).fit(module, loader(UNLABELLED), loader(UNLABELLED))
        with torch.no_grad():
            expected = logme(module.eval().backbone(other()[:][0]), other()[:][1])
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)

    def test_a_guessed_head_that_validation_step_does_not_call_is_dropped_with_one_message(self, tmp_path):
        module = SimSiam("predictor")
        callback = LogMECallback(layers=["backbone"], probes={"news": loader(other())}, num_classes=CLASSES)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = trainer(tmp_path, callback, max_epochs=3)
            run.fit(module, loader(), loader())
        messages = [str(w.message) for w in caught if "logme" in str(w.message)]
        assert len(messages) == 1
        assert "'predictor' was taken for the classifier head" in messages[0]
        assert "head=None" in messages[0]
        assert {row["key"] for row in callback.history} == {"logme/backbone", "logme/news", "logme/news/backbone"}
        assert all(math.isfinite(row["logme"]) for row in callback.history)
        assert len(callback.history) == 9
        assert hooks(module) == 0

    def test_a_source_that_fails_does_not_affect_another(self, tmp_path):
        class Sometimes(Classifier):
            def __init__(self):
                super().__init__()
                self.extra, self.batches = nn.Identity(), 0

            def forward(self, x):
                self.batches += 1
                return self.model(x if self.batches == 2 else self.extra(x))

        callback = LogMECallback(layers=["extra", "model.0"], probes={"news": loader(other())})
        with pytest.warns(UserWarning, match="logme/.*extra is NaN.*'extra' was not called"):
            trainer(tmp_path, callback).validate(Sometimes(), loader(), verbose=False)
        failed = [row["key"] for row in callback.history if math.isnan(row["logme"])]
        assert failed == ["logme/extra"]
        assert len(callback.history) == 6

    def test_features_callable_that_returns_none_is_an_error(self, tmp_path):
        callback = LogMECallback(features=lambda module, batch: None, num_classes=CLASSES)
        with pytest.raises(ValueError, match="features=callable.* returned no tensor"):
            trainer(tmp_path, callback).validate(SelfSupervised(), loader(), verbose=False)

    @pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
    def test_probes_run_at_the_end_of_an_epoch_without_validation(self, tmp_path):
        """In time for callbacks that monitor them."""
        checkpoint = ModelCheckpoint(tmp_path, "best", monitor="logme/news", mode="max", save_top_k=-1)
        callback = LogMECallback(
            probes={"news": loader(other())}, validation=False, features=lambda module, batch: module(batch[0])
        )
        module = SelfSupervised()
        module.encoder.append(nn.Dropout(0.5))
        trainer(tmp_path, callback, checkpoint, max_epochs=2).fit(module, loader(UNLABELLED))
        with torch.no_grad():
            expected = logme(copy.deepcopy(module).eval()(other()[:][0]), other()[:][1])
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)
        assert [row["epoch"] for row in callback.history] == [0, 1]
        assert float(checkpoint.current_score) == pytest.approx(callback.history[-1]["logme"], rel=1e-6)
        assert all(part.training for part in module.modules())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("validated", [True, False])
def test_plots_are_logged_at_the_steps_of_the_scalars(tmp_path, validated):
    callback = LogMECallback(probes={"news": loader(other())}, validation=False, plots=True)
    logger = TensorBoardLogger(tmp_path, "", "")
    run = trainer(tmp_path, callback, logger=logger, log_every_n_steps=1)
    run.fit(Classifier(), loader(), loader() if validated else None)
    seen = events(tmp_path)
    steps = [event.step for event in seen.Scalars("logme/news")]
    assert [event.step for event in seen.Images("logme/news/gain_by_output")] == steps
    assert len(steps) == 2


class TestSchedule:
    def test_probes_run_in_every_second_validation(self, tmp_path):
        callback = LogMECallback(probes={"news": loader(other())}, probe_every=2)
        trainer(tmp_path, callback, max_epochs=5).fit(Classifier(), loader(), loader())
        assert [row["epoch"] for row in rows_of(callback, "logme/news")] == [0, 2, 4]
        assert len(rows_of(callback, "logme")) == 5

    @pytest.mark.parametrize(
        ("checkpoint", "epochs"),
        [
            ({"every_n_epochs": 2}, [1, 3]),
            ({"every_n_epochs": 2, "save_on_train_epoch_end": True}, [1, 3]),
            ({"monitor": "falling", "mode": "max"}, [0]),
            ({"monitor": "falling", "mode": "min"}, [0, 1, 2, 3]),
            ({"monitor": "falling", "mode": "max", "save_top_k": 2}, [0, 1]),
            ({"every_n_train_steps": 10}, [1, 3]),
            ({"monitor": "falling", "every_n_train_steps": 10}, [1, 3]),
            ({"save_top_k": 0}, []),
        ],
    )
    def test_probes_run_when_a_checkpoint_is_saved(self, tmp_path, checkpoint, epochs):
        class Falling(Classifier):
            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)
                self.log("falling", -float(self.current_epoch))

        callback = LogMECallback(probes={"news": loader(other())}, probe_every="checkpoint")
        saving = ModelCheckpoint(tmp_path, "{epoch}-{step}", **checkpoint)
        run = trainer(tmp_path, callback, saving, max_epochs=4, num_sanity_val_steps=0)
        run.fit(Falling(), loader(), loader())
        assert [row["epoch"] for row in rows_of(callback, "logme/news")] == epochs
        files = {int(path.name.split("epoch=")[1].split("-")[0]) for path in tmp_path.glob("*.ckpt")}
        assert files <= set(epochs)

    def test_a_checkpoint_holds_the_score_of_its_own_weights(self, tmp_path):
        callback = LogMECallback(probes={"news": loader(other())}, probe_every="checkpoint")
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=2, save_top_k=-1, save_last=True)
        logger = TensorBoardLogger(tmp_path, "", "")
        run = trainer(tmp_path, callback, saving, max_epochs=4, logger=logger)
        run.fit(Classifier(), loader(), loader())
        assert "logme/news" not in run.callback_metrics
        steps = []
        for path in sorted(tmp_path.glob("step=*.ckpt")):
            checkpoint = torch.load(path, weights_only=True)
            module = Classifier()
            module.load_state_dict(checkpoint["state_dict"])
            row = [row for row in read_history(path) if row["key"] == "logme/news"][-1]
            assert row["global_step"] == checkpoint["global_step"]
            expected = logme(*penultimate(module, "model.2", other()))
            assert row["logme"] == pytest.approx(float(expected), rel=1e-5)
            steps.append(row["global_step"])
        assert steps == [10, 20]
        numbers = [row["global_step"] for row in rows_of(callback, "logme/news")]
        assert len(numbers) == len(set(numbers))  # not again for last.ckpt
        scores = [event.value for event in events(tmp_path).Scalars("logme/news")]
        assert scores == pytest.approx([row["logme"] for row in rows_of(callback, "logme/news")])

    @pytest.mark.parametrize(("every", "steps"), [(1, list(range(10))), (2, [1, 3, 5, 7, 9])])
    def test_scores_at_a_checkpoint_within_an_epoch_are_logged_at_the_step_of_the_batch(self, tmp_path, every, steps):
        class Logging(Classifier):
            def training_step(self, batch, batch_idx):
                self.log("batch", float(self.trainer.fit_loop.total_batch_idx))
                return super().training_step(batch, batch_idx)

        callback = LogMECallback(probes={"news": loader(other())}, probe_every="checkpoint")
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=every, save_top_k=-1)
        logger = TensorBoardLogger(tmp_path, "", "")
        run = trainer(tmp_path, callback, saving, logger=logger, log_every_n_steps=1)
        run.fit(Logging(), loader(), loader())
        seen = events(tmp_path)
        assert [event.step for event in seen.Scalars("logme/news")] == steps
        assert {event.step: event.value for event in seen.Scalars("batch")} == {step: step for step in range(10)}

    def test_training_is_the_same_to_the_last_bit(self, tmp_path):
        weights = []
        for probes in (None, {"news": loader(other())}):
            torch.manual_seed(0)
            module = Classifier(nn.Sequential(nn.Linear(16, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)))
            callback = LogMECallback(probes=probes, probe_every="checkpoint")
            saving = ModelCheckpoint(tmp_path / str(bool(probes)), every_n_train_steps=2, save_top_k=-1)
            trainer(tmp_path, callback, saving).fit(module, loader(), loader())
            weights.append(module.state_dict())
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)

    def test_a_failing_probe_does_not_lose_the_checkpoint(self, tmp_path):
        class Failing(Classifier):
            def forward(self, x):
                if x.shape[0] == 30 and self.global_step > 5:
                    raise OSError("out of order")
                return super().forward(x)

        callback = LogMECallback(probes={"news": loader(other(), 30)}, probe_every="checkpoint")
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        with pytest.warns(UserWarning, match="logme/news is NaN, after an error: OSError: out of order"):
            trainer(tmp_path, callback, saving).fit(Failing(), loader(), loader())
        assert math.isnan(read_history(tmp_path / "step=10.ckpt")[-1]["logme"])

    def test_validate_runs_probes_without_a_checkpoint(self, tmp_path):
        callback = LogMECallback(probes={"news": loader(other())}, probe_every="checkpoint")
        trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)
        assert len(rows_of(callback, "logme/news")) == 1


class TestFailures:
    def test_training_goes_on_after_a_failure(self, tmp_path):
        calls = []

        def forward(module, batch):
            calls.append(1)
            if len(calls) == 3:  # after one in the sanity check and one in the first epoch
                raise RuntimeError("on purpose")
            return module(batch[0])

        callback = LogMECallback(probes={"news": Probe(loader(other(40), 40), forward=forward)})
        with pytest.warns(UserWarning, match="logme/news is NaN, after an error: RuntimeError: on purpose"):
            run = trainer(tmp_path, callback, max_epochs=3)
            run.fit(Classifier(), loader(), loader())
        scores = [row["logme"] for row in rows_of(callback, "logme/news")]
        assert [math.isnan(score) for score in scores] == [False, True, False]
        assert [math.isnan(row["logme"]) for row in rows_of(callback, "logme")] == [False] * 3

    @pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
    @pytest.mark.parametrize("validated", [True, False])
    def test_a_failure_in_the_first_batch_raises_before_training(self, tmp_path, validated):
        class Untouched(Classifier):
            def training_step(self, batch, batch_idx):
                pytest.fail("training began")

        probes = {"news": Probe(loader(TensorDataset(torch.randn(20, 5), torch.arange(20) % 3)))}
        callback = LogMECallback(probes=probes, validation=validated)
        message = r"probes\['news'\]: its first batch cannot be scored: RuntimeError: mat1 and.*Probe\(forward="
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callback).fit(Untouched(), loader(), loader() if validated else None)

    def test_a_module_without_forward_raises_before_training(self, tmp_path):
        class NoForward(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.backbone = mlp(16, 8)

            def training_step(self, batch, batch_idx):
                pytest.fail("training began")

            def validation_step(self, batch, batch_idx):
                self.backbone(batch[0])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        callback = LogMECallback(layers=["backbone"], probes={"news": loader(other())}, validation=False)
        with pytest.raises(ValueError, match=r"probes\['news'\]: .*Probe\(forward=callable\(module, batch\)\)"):
            trainer(tmp_path, callback).fit(NoForward(), loader(), loader())
        probe = Probe(loader(other()), forward=lambda module, batch: module.backbone(batch[0]))
        callback = LogMECallback(layers=["backbone"], probes={"news": probe}, validation=False)
        trainer(tmp_path, callback).validate(NoForward(), loader(), verbose=False)
        assert math.isfinite(callback.history[0]["logme"])

    def test_nan_features_give_nan_and_a_warning(self, tmp_path):
        callback = LogMECallback(probes={"news": Probe(loader(other()), forward=lambda m, b: m(b[0] * math.nan))})
        with pytest.warns(UserWarning, match="features contain NaN"):
            trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)
        assert math.isnan(callback.history[-1]["logme"])

    def test_no_hook_is_left_and_the_module_can_be_copied(self, tmp_path):
        module, callback = Classifier(), LogMECallback(probes={"news": loader(other())}, layers=["model.0"])
        trainer(tmp_path, callback, max_epochs=1).fit(module, loader(), loader())
        assert hooks(module) == 0
        assert "log" not in vars(module)
        torch.testing.assert_close(copy.deepcopy(module).state_dict(), module.state_dict())


class TestBadInput:
    @pytest.mark.parametrize(
        ("probe", "message"),
        [
            (lambda: loader(UNLABELLED), r"probes\['news'\]: no labels found in a batch"),
            (
                lambda: loader(TensorDataset(torch.randn(9, 16), torch.randn(9))),
                r"probes\['news'\].*integer class labels",
            ),
            (lambda: Probe(loader(other()), num_classes=2), r"probes\['news'\].*labels from 0 to 2"),
            (lambda: Probe(loader(other()), target="score"), r"probes\['news'\].*target='score' does not lead"),
            (lambda: 3, r"probes\['news'\].*must be a DataLoader"),
            (lambda: iter(loader(other())), r"probes\['news'\].*read only once"),
            (lambda: Probe([list(other()[:20])]), r"probes\['news'\].*num_classes is needed"),
        ],
    )
    def test_labels_are_checked_before_training(self, tmp_path, probe, message):
        callback = LogMECallback(probes={"news": probe()})
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callback).fit(Classifier(), loader(), loader())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"probes": [loader()]}, "probes must be a mapping"),
            ({"probes": {"": loader()}}, "probes: the name ''"),
            ({"probes": {"layer_mean": loader()}}, "probes: the name 'layer_mean'"),
            ({"probes": {"dataloader_idx_0": loader()}}, "probes: the name 'dataloader_idx_0'"),
            ({"probes": {"a": loader()}, "probe_every": 0}, "probe_every must be a positive integer or 'checkpoint'"),
            ({"probes": {"a": loader()}, "probe_every": "epoch"}, "probe_every must be"),
            ({"validation": False}, "without probes nothing would be scored"),
            ({"layer_mean": True}, "layer_mean is the mean of layers"),
            ({"features": 3}, "features must be a callable"),
            ({"features": len, "head": "fc"}, "replaces head"),
        ],
    )
    def test_bad_options_of_the_callback_are_an_error(self, options, message):
        with pytest.raises(ValueError, match=message):
            LogMECallback(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"task": "classes"}, "task must be one of"),
            ({"limit_batches": 0}, "limit_batches must be a positive integer"),
            ({"forward": "forward"}, "forward must be callable"),
        ],
    )
    def test_bad_options_of_a_probe_are_an_error(self, options, message):
        with pytest.raises(ValueError, match=message):
            Probe(loader(), **options)

    def test_a_probe_with_the_name_of_a_layer_is_an_error(self, tmp_path):
        callback = LogMECallback(layers=["model"], probes={"model": loader(other())})
        with pytest.raises(ValueError, match="probes: the name 'model' leads to the key 'model', which is logged"):
            trainer(tmp_path, callback).fit(Classifier(), loader(), loader())


class Hooked(Classifier):
    """Normalises on the device, as many vision modules do."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0].abs(), batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 3 + 1, batch[1]]


def test_batches_go_through_the_hooks_of_the_module(tmp_path):
    callback = LogMECallback(probes={"same": loader()})
    trainer(tmp_path, callback).validate(Hooked(), loader(), verbose=False)
    scores = {row["key"]: row["logme"] for row in callback.history}
    assert scores["logme/same"] == pytest.approx(scores["logme"], rel=1e-5)


def test_an_attention_mask_beside_the_labels_is_used(tmp_path):
    """In (inputs, labels) batches, of the validation set and of a probe, as in a ranking."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Linear(16, 8), nn.Linear(8, CLASSES)

        def forward(self, inputs):
            return self.fc(self.embed(inputs["x"])).mean(1)

    x, mask, y = torch.randn(40, 5, 16), (torch.rand(40, 5) > 0.4).long(), torch.arange(40) % CLASSES
    mask[:, 0] = 1
    data = [({"x": x[i], "attention_mask": mask[i]}, y[i]) for i in range(40)]
    module, callback = (
        Classifier(Tokens()),
        LogMECallback(probes={"same": Probe(loader(data), num_classes=CLASSES, forward=lambda m, b: m(b[0]))}),
    )
    trainer(tmp_path, callback).validate(module, loader(data), verbose=False)
    with torch.no_grad():
        embedded = module.model.embed(x)
    expected = logme((embedded * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), y)
    assert [row["logme"] for row in callback.history] == pytest.approx([float(expected)] * 2, rel=1e-5)


@pytest.mark.parametrize("shown", [True, False])
def test_a_slow_probe_has_a_progress_bar(tmp_path, monkeypatch, capsys, shown):
    def at_once(*args, **options):
        return tqdm(*args, **{**options, "delay": 0})

    monkeypatch.setattr("lightning_logme.tracking.probe.tqdm", at_once)
    callback = LogMECallback(probes={"news": loader(other())})
    trainer(tmp_path, callback, enable_progress_bar=shown).validate(Classifier(), loader(), verbose=False)
    assert ("probe news" in capsys.readouterr().err) == shown


class TestNoTrace:
    def test_a_cache_and_its_length_are_restored(self, tmp_path):
        """As rotary embeddings have: a buffer that grows, and an attribute that holds its length."""

        class Cached(Classifier):
            def __init__(self):
                super().__init__(nn.Sequential(nn.Linear(16, 8), nn.Flatten(), nn.LazyLinear(CLASSES)))
                self.register_buffer("table", torch.zeros(0), persistent=False)
                self.longest = 0

            def forward(self, x):
                if x.shape[1] > self.longest:
                    self.table, self.longest = torch.linspace(0, 1, x.shape[1]), x.shape[1]
                    self.register_buffer(f"seen_{x.shape[1]}", torch.ones(1))
                return self.model((x + self.table[: x.shape[1], None])[:, :2])

        def tokens(length, n=40):
            return TensorDataset(torch.randn(n, length, 16), torch.arange(n) % CLASSES)

        module, callback = Cached(), LogMECallback(probes={"long": loader(tokens(10))})
        module(tokens(4)[:2][0])
        trainer(tmp_path, callback).fit(module, loader(tokens(6)), loader(tokens(4)))
        assert [math.isfinite(row["logme"]) for row in callback.history] == [True] * 4
        assert module.longest == len(module.table) == 6
        assert not hasattr(module, "seen_10")

    def test_inputs_that_forward_writes_to_stay_unchanged(self, tmp_path):
        def forward(module, batch):
            return module(batch[0].mul_(2))

        batches = [(other()[:][0].clone(), other()[:][1])]
        callback = LogMECallback(probes={"news": Probe(batches, num_classes=3, forward=forward)})
        trainer(tmp_path, callback).fit(Classifier(), loader(), loader())
        torch.testing.assert_close(batches[0][0], other()[:][0])

    def test_generators_of_the_module_are_restored(self, tmp_path):
        class Noisy(Classifier):
            def __init__(self):
                super().__init__()
                self.of_torch = torch.Generator().manual_seed(1)
                self.model.another = torch.Generator().manual_seed(2)

            def forward(self, x):
                scale = torch.rand(1, generator=self.model.another)
                return super().forward(scale * x + torch.randn(x.shape, generator=self.of_torch))

        weights = []
        for probes in ({}, {"news": loader(other())}):
            torch.manual_seed(0)
            module = Noisy()
            trainer(tmp_path, LogMECallback(probes=probes)).fit(module, loader(), loader())
            weights.append(module.state_dict())
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)

    def test_a_data_module_whose_hooks_prepare_batches_is_restored(self, tmp_path):
        """The run is the same to the last bit, although the hooks count batches and draw random numbers."""

        class Noisy(pl.LightningDataModule):
            def __init__(self):
                super().__init__()
                self.generator = torch.Generator().manual_seed(1)
                self.batches = 0

            def train_dataloader(self):
                return loader()

            val_dataloader = train_dataloader

            def on_after_batch_transfer(self, batch, dataloader_idx):
                self.batches += 1
                return batch[0] + torch.randn(batch[0].shape, generator=self.generator) / self.batches, batch[1]

        seen = []
        for probes in ({}, {"news": loader(other())}):
            torch.manual_seed(0)
            module, data = Classifier(), Noisy()
            trainer(tmp_path, LogMECallback(probes=probes)).fit(module, data)
            seen.append((data.batches, data.generator.get_state(), *module.state_dict().values()))
        torch.testing.assert_close(*seen, rtol=0, atol=0)

    def test_the_generator_of_a_shared_sampler_is_restored(self, tmp_path):
        def order(probes):
            generator = torch.Generator().manual_seed(5)
            sampler = RandomSampler(range(96), num_samples=60, generator=generator)
            seen = []

            class Watched(Classifier):
                def training_step(self, batch, batch_idx):
                    seen.append(batch[0].clone())
                    return super().training_step(batch, batch_idx)

            callback = LogMECallback(probes={"same": loader(sampler=sampler)} if probes else {})
            trainer(tmp_path, callback).fit(Watched(), loader(sampler=sampler), loader())
            return torch.cat(seen)

        assert torch.equal(order(probes=False), order(probes=True))

    def test_a_stream_in_another_order_has_the_same_score(self, tmp_path):
        class Stream(IterableDataset):
            generator = torch.Generator().manual_seed(1)

            def __iter__(self):
                return (other()[index] for index in torch.randperm(150, generator=self.generator).tolist())

        callback = LogMECallback(probes={"news": Probe(DataLoader(Stream(), 40), num_classes=3)})
        trainer(tmp_path, callback).fit(Classifier(lr=0.0), loader(), loader())
        first, second = (row["logme"] for row in rows_of(callback, "logme/news"))
        assert first == pytest.approx(second, rel=1e-6)

    def test_a_copy_of_the_callback_made_during_a_run_can_be_used(self, tmp_path):
        copies = []

        class Copies(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                copies.append(copy.deepcopy(callback))

        callback = LogMECallback(probes={"news": loader(other())})
        trainer(tmp_path, callback, Copies(), max_epochs=1).fit(Classifier(), loader(), loader())
        trainer(tmp_path, copies[0], max_epochs=1).fit(Classifier(), loader(), loader())
        assert len(copies[0].history) == 2


class TestWarnings:
    def test_a_monitor_of_a_probe_that_skips_validations_is_warned_of(self, tmp_path):
        stopping = EarlyStopping("logme/news", mode="max", patience=1)
        callback = LogMECallback(probes={"news": loader(other())}, probe_every=2)
        with pytest.warns(UserWarning, match="probe_every=2: EarlyStopping monitors a probe"):
            trainer(tmp_path, callback, stopping).validate(Classifier(), loader(), verbose=False)

    def test_a_monitor_of_another_key_with_the_same_prefix_gives_no_warning(self, tmp_path):
        stopping = EarlyStopping(monitor="logme/newspaper", mode="max", strict=False)
        callback = LogMECallback(probes={"news": loader(other())}, probe_every=2)
        run = trainer(tmp_path, callback, stopping)
        callback.setup(run, Classifier(), "fit")

    @pytest.mark.parametrize("monitor", [EarlyStopping, ModelCheckpoint])
    def test_a_monitor_of_a_probe_at_checkpoints_is_an_error(self, tmp_path, monitor):
        callback = LogMECallback(probes={"news": loader(other())}, probe_every="checkpoint")
        with pytest.raises(ValueError, match=f"{monitor.__name__} monitors 'logme/news'.*write probe_every=1"):
            trainer(tmp_path, callback, monitor(monitor="logme/news", mode="max")).fit(Classifier(), loader(), loader())

    @pytest.mark.parametrize("savings", [[], [ModelCheckpoint(save_weights_only=True)]])
    def test_probes_at_checkpoints_warn_if_no_checkpoint_is_saved(self, tmp_path, savings):
        callback = LogMECallback(probes={"news": loader(other())}, probe_every="checkpoint")
        with pytest.warns(UserWarning, match="no ModelCheckpoint saves checkpoints with the state of callbacks"):
            trainer(tmp_path, callback, *savings).fit(Classifier(), loader(), loader())
        assert rows_of(callback, "logme/news") == []

    def test_averaging_weights_before_the_callback_is_warned_of(self, tmp_path):
        averaging = getattr(pl.callbacks, "EMAWeightAveraging", None)
        if averaging is None:
            pytest.skip("this version of Lightning does not average weights")

        def run(*before, after=()):
            callback = LogMECallback(probes={"same": loader()})
            fitting = trainer(tmp_path, *before, callback, *after, max_epochs=2, num_sanity_val_steps=0)
            fitting.fit(Classifier(lr=0.5), loader(), loader())
            return {row["key"]: row["logme"] for row in callback.history}

        scores = run(after=[averaging()])
        assert scores["logme/same"] == pytest.approx(scores["logme"], rel=1e-5)
        with pytest.warns(UserWarning, match="put LogMECallback before WeightAveraging"):
            run(averaging())

    def test_fast_dev_run_runs_one_batch(self, tmp_path):
        callback = LogMECallback(probes={"news": loader(other(), 20)})
        trainer(tmp_path, callback, fast_dev_run=True).fit(Classifier(), loader(), loader())
        assert rows_of(callback, "logme/news")[0]["num_samples"] == 20

    def test_two_sources_of_one_key_are_an_error(self, tmp_path):
        callback = LogMECallback(layers=["model.0"], probes={"a": loader(other()), "a/model.0": loader(other())})
        with pytest.raises(ValueError, match="'a/model.0', which is logged for a layer or another probe as well"):
            trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)

    def test_the_error_of_a_broken_data_set_names_the_probe(self, tmp_path):
        class Broken(Dataset):
            def __len__(self):
                return 40

            def __getitem__(self, index):
                raise OSError("disk on fire")

        for probe, message in (
            (Probe(DataLoader(Broken()), num_classes=3), "OSError: disk on fire"),
            (DataLoader(TensorDataset(torch.zeros(0, 16), torch.zeros(0).long())), "dataloader has no samples"),
        ):
            with pytest.raises(ValueError, match=rf"probes\['news'\].*({message})"):
                trainer(tmp_path, LogMECallback(probes={"news": probe})).fit(Classifier(), loader(), loader())


def test_probes_are_refused_under_sharded_strategies(tmp_path):
    class FSDPStrategy:
        pass

    probes = Probes({"news": loader(other())}, 1)
    fsdp = SimpleNamespace(world_size=2, strategy=FSDPStrategy(), callbacks=[])
    with pytest.raises(ValueError, match="probes: they cannot run under FSDPStrategy.*score_checkpoints"):
        probes.prepare(fsdp, LogMECallback(), "logme")


def test_ignored_labels_do_not_count(tmp_path):
    features, labels = map(torch.as_tensor, problem(90, 16, 3, 5))
    labels[::4] = -100
    data = TensorDataset(features.float(), labels)
    module, callback = Classifier(), LogMECallback(probes={"news": loader(data)})
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    expected = evidence(*penultimate(module, "model.2", data), ignore_index=-100)
    assert callback.history[-1]["num_samples"] == expected.num_samples == 67
    assert callback.history[-1]["logme"] == pytest.approx(float(expected.score), rel=1e-5)
