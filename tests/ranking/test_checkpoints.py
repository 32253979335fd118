"""Checkpoints of one network, ranked on a target task."""

import inspect
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.compile import from_compiled
from models import CLASSES, Classifier, loader, mlp, penultimate, trainer, vectors
from torch import nn

from lightning_logme import LogMECallback, rank_backbones, score_checkpoints
from lightning_logme.cli import main
from lightning_logme.functional import leave_one_out, logme

QUIET = {"accelerator": "cpu", "progress": False}


def target():
    return vectors(300, seed=4)


@pytest.fixture
def run(tmp_path):
    """The folder of a run of three epochs, with a checkpoint after each."""
    saving = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    fitting = trainer(tmp_path, saving, LogMECallback(probes={"target": loader(target())}), max_epochs=3)
    fitting.fit(Classifier(), loader(shuffle=True), loader())
    return tmp_path / "saved"


def expected(path):
    module = Classifier()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return float(logme(*penultimate(module, "model.2", target())))


def test_scores_of_every_checkpoint_by_its_path(run):
    paths = [run / "epoch=2.ckpt", str(run / "epoch=0.ckpt")]
    ranking = score_checkpoints(Classifier(), paths, loader(target()), race=False, **QUIET)
    assert ranking.scores == pytest.approx({str(path): expected(path) for path in paths}, rel=1e-6)
    assert all(row.num_samples == 300 and row.stderr > 0 for row in ranking.rows)


def test_the_checkpoints_of_a_folder_have_the_scores_of_the_probe(run):
    ranking = score_checkpoints(Classifier(), run, loader(target()), race=False, **QUIET)
    assert set(ranking.scores) == {str(run / f"epoch={epoch}.ckpt") for epoch in range(3)}
    history = torch.load(run / "epoch=2.ckpt", weights_only=True)["callbacks"]["LogMECallback{'name': 'logme'}"][
        "history"
    ]
    probed = {row["epoch"]: row["logme"] for row in history if row["key"] == "logme/target"}
    assert set(probed) == {0, 1, 2}
    for epoch, score in probed.items():
        assert ranking.scores[str(run / f"epoch={epoch}.ckpt")] == pytest.approx(score, rel=1e-6)


def test_scoring_leaves_the_module_unchanged(run):
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    score_checkpoints(module, run, loader(target()), **QUIET)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert module.training


def test_a_broken_file_becomes_a_failed_row(run, tmp_path):
    (run / "broken.ckpt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {"other": torch.ones(3)}}, run / "other.ckpt")
    torch.save([1, 2], run / "list.ckpt")
    torch.save({"state_dict": Classifier(mlp(16, 7)).state_dict()}, run / "wider.ckpt")
    torch.save({"state_dict": Classifier().state_dict(), "when": Path("x")}, run / "unsafe.ckpt")
    paths = [*sorted(run.glob("*.ckpt")), run / "missing.ckpt"]
    ranking = score_checkpoints(Classifier(), paths, loader(target()), **QUIET)
    failed = {Path(row.name).name: row.message for row in ranking.rows if row.ended == "failed"}
    assert set(failed) == {f"{name}.ckpt" for name in ("broken", "other", "list", "wider", "unsafe", "missing")}
    assert "Missing key" in failed["other.ckpt"]
    assert "neither a Lightning checkpoint nor a state dict" in failed["list.ckpt"]
    assert "size mismatch" in failed["wider.ckpt"]
    assert "Weights only load failed" in failed["unsafe.ckpt"]
    assert "FileNotFoundError" in failed["missing.ckpt"]
    assert len(ranking.scores) == 3


def test_checkpoints_can_be_ranked_by_accuracy(run):
    ranking = score_checkpoints(Classifier(), run, loader(target()), rank_by="accuracy", race=False, **QUIET)
    for path, accuracy in ranking.scores.items():
        module = Classifier()
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        features, labels = penultimate(module, "model.2", target())
        predictions = leave_one_out(features, labels)
        assert accuracy == pytest.approx(float((predictions.argmax(1) == labels).double().mean()), abs=1e-6)
    assert list(ranking.scores.values()) == sorted(ranking.scores.values(), reverse=True)
    assert len(ranking.scores) == 3


def test_an_error_is_raised_if_every_file_is_broken(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(RuntimeError, match="every candidate failed.*a.ckpt"):
        score_checkpoints(Classifier(), tmp_path, loader(target()), **QUIET)


def test_a_plain_module_and_its_state_dict_are_scored(tmp_path):
    module = mlp()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    ranking = score_checkpoints(mlp(), tmp_path / "weights.pt", loader(target()), **QUIET)
    expected = logme(*penultimate(module, "2", target()))
    assert ranking.scores[str(tmp_path / "weights.pt")] == pytest.approx(float(expected), rel=1e-6)


def test_on_load_checkpoint_is_called(run):
    class Growing(Classifier):
        def __init__(self):
            super().__init__(nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, CLASSES)))

        def on_load_checkpoint(self, checkpoint):
            self.model(torch.zeros(1, 16))

    path = run / "epoch=1.ckpt"
    ranking = score_checkpoints(Growing(), path, loader(target()), **QUIET)
    assert ranking.scores == pytest.approx({str(path): expected(path)}, rel=1e-6)


class TestModifiedInstances:
    """Nothing that is attached to an instance may keep using the weights of the original."""

    @pytest.mark.parametrize("way", ["from_compiled", "compile", "wrapped"])
    def test_a_compiled_module_is_scored_with_the_weights_of_each_checkpoint(self, run, way):
        torch.compiler.reset()
        module: Any = Classifier()
        if way == "compile":
            module.compile(backend="eager")
            module(torch.randn(2, 16))
        elif way == "wrapped":
            module = torch.compile(module, backend="eager")
        else:
            module = from_compiled(torch.compile(module, backend="eager"))
        ranking = score_checkpoints(module, run, loader(target()), race=False, **QUIET)
        assert ranking.scores == pytest.approx({str(path): expected(path) for path in run.glob("*.ckpt")}, rel=1e-6)

    def test_a_forward_set_on_the_instance_is_an_error(self, run):
        module = Classifier()
        original = module.forward
        module.forward = lambda x: original(x)
        with pytest.raises(RuntimeError, match="has a forward function set on the instance"):
            score_checkpoints(module, run, loader(target()), **QUIET)

    def test_checkpoints_of_a_compiled_network_are_scored(self, run, tmp_path):
        saved = torch.load(run / "epoch=1.ckpt", weights_only=True)
        weights = {name.replace("model.", "model._orig_mod."): value for name, value in saved["state_dict"].items()}
        torch.save({"state_dict": weights}, tmp_path / "compiled.ckpt")
        ranking = score_checkpoints(Classifier(), tmp_path / "compiled.ckpt", loader(target()), **QUIET)
        assert list(ranking.scores.values()) == pytest.approx([expected(run / "epoch=1.ckpt")], rel=1e-6)


def test_checkpoints_are_loaded_as_by_load_from_checkpoint(run):
    """With configure_model, changes by on_load_checkpoint, and strict_loading."""

    class Module(Classifier):
        def __init__(self):
            super().__init__(nn.Identity())
            self.strict_loading = False
            self.extra = nn.Parameter(torch.zeros(2))

        def configure_model(self):
            self.model = mlp()

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {name: -value for name, value in checkpoint["state_dict"].items()}

    path = run / "epoch=1.ckpt"
    negative = Classifier()
    negative.load_state_dict({name: -v for name, v in torch.load(path, weights_only=True)["state_dict"].items()})
    ranking = score_checkpoints(Module(), path, loader(target()), **QUIET)
    assert ranking.scores[str(path)] == pytest.approx(
        float(logme(*penultimate(negative, "model.2", target()))), rel=1e-6
    )


class TestWhichFeature:
    def test_head_names_the_layer_that_is_scored(self, run):
        path = str(run / "epoch=1.ckpt")
        module = Classifier()
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        for head in ("model.0", {path: "model.0"}, {Path(path): "model.0"}):
            ranking = score_checkpoints(Classifier(), path, loader(target()), head=head, **QUIET)
            expected = logme(*target().tensors)
            assert ranking.scores[path] == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.parametrize("through_the_head", [False, True])
    def test_a_custom_forward_returns_features_unless_it_runs_the_classifier(self, run, through_the_head):
        def forward(module, batch):
            return module.model(batch[0]) if through_the_head else module.model[0](batch[0])

        path = str(run / "epoch=1.ckpt")
        ranking = score_checkpoints(Classifier(), path, loader(target()), forward=forward, **QUIET)
        module = Classifier()
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        if through_the_head:
            features = penultimate(module, "model.2", target())[0]
        else:
            features = module.model[0](target().tensors[0]).detach()
        assert ranking.scores[path] == pytest.approx(float(logme(features, target().tensors[1])), rel=1e-6)

    def test_without_a_head_the_output_is_scored(self, tmp_path):
        class Headless(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv1d(1, 6, 8)

            def forward(self, x):
                return self.conv(x[:, None]).mean(2)

        module = Headless()
        torch.save(module.state_dict(), tmp_path / "a.ckpt")
        for options in ({}, {"forward": lambda module, batch: module(batch[0])}):
            ranking = score_checkpoints(module, tmp_path, loader(target()), **options, **QUIET)
            assert (ranking.rows[0].num_features, ranking.rows[0].feature) == (6, "output")


@pytest.mark.parametrize(
    ("module", "paths", "message"),
    [
        (Classifier, "x.ckpt", "module must be the torch.nn.Module"),
        (Classifier(), [], "paths is empty"),
        (Classifier(), ".", "holds no .ckpt file"),
        (Classifier(), ["x.ckpt", "x.ckpt"], "two entries named 'x.ckpt'"),
    ],
)
def test_bad_arguments_are_an_error(module, paths, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        score_checkpoints(module, paths, loader(target()), **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"race": "false"}, "race must be True or False, got 'false'"),
        ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
        ({"target": True}, "target must be a key"),
        ({"seed": "0"}, "seed must be an integer, got '0'"),
    ],
)
def test_bad_options_are_an_error(options, message, run):
    with pytest.raises(ValueError, match=message):
        score_checkpoints(Classifier(), run, loader(target()), **{**QUIET, **options})


def test_options_are_those_of_rank_backbones():
    own, others = (inspect.signature(call).parameters for call in (score_checkpoints, rank_backbones))
    assert len(own) > 10
    assert list(own)[3:] == list(others)[2:]
    for name in list(own)[3:]:
        assert own[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert name == "head" or own[name].default == others[name].default
        assert re.search(rf"\b{name}\b[^.]*: ", score_checkpoints.__doc__), name
    with pytest.raises(TypeError, match="score_checkpoints.* got an unexpected keyword argument 'rase'"):
        score_checkpoints(Classifier(), ".", loader(target()), rase=False)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(target())


def test_checkpoints_can_be_scored_from_the_shell(run, tmp_path, capsys):
    config = {
        "module": {"class_path": "models.Classifier", "init_args": {"lr": 0.2}},
        "paths": str(run),
        "data": {"class_path": f"{Data.__module__}.Data"},
        "accelerator": "cpu",
        "progress": False,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["score_checkpoints", str(path), "--race", "false", "--output", str(tmp_path / "out")]) == 0
    scores = score_checkpoints(Classifier(), run, loader(target()), race=False, **QUIET).scores
    lines = (tmp_path / "out" / "ranking.csv").read_text().splitlines()
    assert {line.split(",")[0]: float(line.split(",")[1]) for line in lines[1:]} == scores
    assert main(["score_checkpoints", str(path), "--paths", str(tmp_path)]) == 1
    assert "lightning_logme score_checkpoints: ValueError: paths: the folder" in capsys.readouterr().err
