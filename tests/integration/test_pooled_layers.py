"""Layers of all layouts are pooled in whole runs: maps, tokens under a mask, nested tensors, outputs of backbones."""

import math

import pytest
import torch
from models import CLASSES, Classifier, hooks, loader, mlp, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback, Probe, rank_backbones
from lightning_logme.functional import logme

SAMPLES = 40
LABELS = torch.arange(SAMPLES) % CLASSES


class ChannelsLast(nn.Module):
    """A map (N, H, W, C) from a convolution, as in Swin."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = ChannelsLast()
        self.drop = nn.Identity()
        self.squeeze = nn.Conv1d(12, 10, 1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.drop(self.stage(x)).flatten(1, 2)
        return self.head(self.squeeze(tokens.transpose(1, 2)).mean(2))


def images(size: int = 7) -> TensorDataset:
    return TensorDataset(torch.randn(SAMPLES, 3, size, size) + LABELS[:, None, None, None], LABELS)


def test_layers_of_all_layouts_are_scored_at_their_widths(tmp_path, caplog):
    module, data = Classifier(Network()), images()
    layers = ["model.stage.conv", "model.stage", "model.drop", "model.squeeze"]
    callback = LogMECallback(layers=layers)
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback).validate(module, loader(data, 8), verbose=False)
    x = data.tensors[0]
    with torch.no_grad():
        stage = module.model.stage(x)
        expected = {
            "model.stage.conv": module.model.stage.conv(x).mean((2, 3)),
            "model.stage": stage.mean((1, 2)),
            "model.drop": stage.mean((1, 2)),
            "model.squeeze": module.model.squeeze(stage.flatten(1, 2).transpose(1, 2)).mean(2),
        }
    for layer, features in expected.items():
        assert callback.evidence[f"logme/{layer}"].weight.shape[1] == features.shape[1]
        (row,) = (row for row in callback.history if row["key"] == f"logme/{layer}")
        assert row["logme"] == pytest.approx(float(logme(features, LABELS)), rel=1e-5)
    assert "layer 'model.stage': (8, 7, 7, 12) averaged over positions, 12 channels on the last axis" in caplog.text
    assert hooks(module) == 0


def test_undecidable_channels_raise_on_the_first_batch_with_the_line_to_write(tmp_path):
    class Views(Classifier):
        def __init__(self):
            super().__init__(mlp(12))
            self.view = nn.Unflatten(1, (3, 4))

        def forward(self, x):
            return self.model(self.view(x).flatten(1))

    data = TensorDataset(torch.randn(SAMPLES, 12) + LABELS[:, None], LABELS)
    message = r"layer 'view' has shape \(20, 3, 4\).*second axis \(3\).*last \(4\); write pooling={'view': 'channels_f"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LogMECallback(layers=["view"])).validate(Views(), loader(data), verbose=False)
    for given, axis in ({"view": "channels_first"}, 2), ({"vie?": "channels_last"}, 1), ("channels_last", 1):
        callback = LogMECallback(layers=["view"], pooling=given)
        trainer(tmp_path, callback).validate(Views(), loader(data), verbose=False)
        expected = logme(data.tensors[0].unflatten(1, (3, 4)).mean(axis), LABELS)
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)


def test_mapping_pools_each_layer_in_its_own_way(tmp_path):
    module, data = Classifier(Network()), images()
    pooling = {"model.stage*": lambda x: x.amax((1, 2)), "model.stage.conv": "mean"}
    callback = LogMECallback(layers=["model.stage", "model.stage.conv"], pooling=pooling)
    trainer(tmp_path, callback).validate(module, loader(data, 8), verbose=False)
    with torch.no_grad():
        expected = logme(module.model.stage(data.tensors[0]).amax((1, 2)), LABELS)
    scores = {row["key"]: row["logme"] for row in callback.history}
    assert scores["logme/model.stage"] == pytest.approx(float(expected), rel=1e-5)
    assert callback.evidence["logme/model.stage.conv"].weight.shape[1] == 12
    callback = LogMECallback(layers=["model.stage"], pooling={"stage": "mean"})
    with pytest.raises(ValueError, match=r"pooling names 'stage', which is not scored; .*'head', 'model.stage'"):
        trainer(tmp_path, callback).validate(module, loader(data, 8), verbose=False)
    with pytest.raises(ValueError, match="pooling must be 'auto', .* got 'max'"):
        LogMECallback(pooling={"model.stage": "max"})


class Text(Classifier):
    """A network of tokens under an attention mask, whose head takes the first token."""

    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.encoder = nn.Linear(12, 16)
        self.prefix = prefix

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(input_ids))
        hidden = torch.cat([hidden[:, :1]] * self.prefix + [hidden], 1)
        return self.model(nn.Identity()(hidden)[:, 0])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(batch["input_ids"], batch["attention_mask"])


def texts(left: bool) -> DataLoader:
    ids = torch.randint(5, 30, (SAMPLES, 9), generator=torch.Generator().manual_seed(1))
    lengths = 4 + torch.arange(SAMPLES) % 5
    positions = torch.arange(9)
    mask = positions >= 9 - lengths[:, None] if left else positions < lengths[:, None]
    rows = [
        {"input_ids": row * real, "attention_mask": real.long(), "labels": label}
        for row, real, label in zip(ids, mask, LABELS, strict=True)
    ]
    return DataLoader(rows, batch_size=8)


class TestMasks:
    @pytest.mark.filterwarnings("ignore:LogME has lost digits")  # With left padding, the token of the head is constant.
    @pytest.mark.parametrize("left", [False, True])
    def test_first_and_last_token_are_never_padding(self, tmp_path, left):
        module, data = Text(), texts(left)
        for pooling, end in (("cls", 0), ("last", -1)):
            callback = LogMECallback(layers=["encoder"], pooling=pooling)
            trainer(tmp_path, callback).validate(module, data, verbose=False)
            rows = []
            for batch in data:
                hidden = module.encoder(module.embedding(batch["input_ids"]))
                rows += [tokens[mask.bool()][end] for tokens, mask in zip(hidden, batch["attention_mask"], strict=True)]
            expected = logme(torch.stack(rows), LABELS)
            assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)

    def test_mask_of_another_length_than_the_tokens_raises_with_both_shapes(self, tmp_path):
        class Prefixed(Text):
            def __init__(self):
                super().__init__(prefix=2)
                self.drop = nn.Identity()

            def forward(self, input_ids, attention_mask):
                hidden = self.encoder(self.embedding(input_ids))
                return self.model(self.drop(torch.cat([hidden[:, :1]] * 2 + [hidden], 1))[:, 0])

        message = r"layer 'drop': .*attention_mask has shape \(8, 9\).*11 tokens \(features of shape \(8, 11, 16\)\)"
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, LogMECallback(layers=["drop"])).validate(Prefixed(), texts(False), verbose=False)
        callback = LogMECallback(layers=["drop"], pooling={"drop": lambda tokens: tokens.mean(1)})
        trainer(tmp_path, callback).validate(Prefixed(), texts(False), verbose=False)
        assert callback.history[-1]["num_samples"] == SAMPLES


@pytest.mark.parametrize("layout", ["last", "1d"])
def test_outputs_of_backbones_are_pooled_over_their_positions(layout):
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 6, 3)

        def forward(self, x):
            return self.conv(x.flatten(2))

    model = ChannelsLast() if layout == "last" else Line()
    options = {"num_classes": CLASSES, "accelerator": "cpu", "progress": False}
    (row,) = rank_backbones({"model": model}, loader(images(), 8), **options).rows
    assert (row.num_features, row.feature) == (12 if layout == "last" else 6, "output")


class TestNested:
    """In eval mode, torch's encoder turns masked tokens into nested tensors, which have no padding."""

    class Encoder(Classifier):
        def __init__(self):
            super().__init__(mlp(16))
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.embedding = nn.Embedding(30, 16)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, input_ids, attention_mask):
            tokens = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
            return self.model(tokens[:, 0])

        def validation_step(self, batch, batch_idx):
            self(batch["input_ids"], batch["attention_mask"])

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
    @pytest.mark.parametrize(("pooling", "pick"), [("auto", lambda t: t.mean(0)), ("last", lambda t: t[-1])])
    def test_outputs_of_encoder_layers_are_pooled_sample_by_sample(self, tmp_path, pooling, pick):
        module, data = self.Encoder(), texts(False)
        layers = ["encoder.layers.0", "encoder.layers.1", "encoder"]
        probes = {"same": Probe(data, num_classes=CLASSES)}
        callback = LogMECallback("model.2", layers=layers, pooling=pooling, probes=probes)
        trainer(tmp_path, callback).validate(module, data, verbose=False)
        module.eval()
        rows = []
        with torch.no_grad():
            for batch in data:
                tokens = module.embedding(batch["input_ids"])
                mask = batch["attention_mask"].bool()
                for one, kept in zip(tokens, mask, strict=True):  # without padding
                    rows.append(pick(module.encoder.layers[0](one[kept][None])[0]))
        expected = float(logme(torch.stack(rows), LABELS))
        scores = {row["key"]: row["logme"] for row in callback.history}
        for key in ("logme/encoder.layers.0", "logme/same/encoder.layers.0"):
            assert scores[key] == pytest.approx(expected, abs=1e-4)
        assert len(scores) == 8
        assert not any(map(math.isnan, scores.values()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_part_of_the_network_gets_no_hooks(tmp_path):
    module = Classifier()
    module.augmentation = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    callback = LogMECallback(layers=["model.*"], probes={"same": loader()})
    trainer(tmp_path, callback).fit(module, loader(), loader())
    assert len(callback.history) == 2 * 2 * 4
    assert not any(math.isnan(row["logme"]) for row in callback.history)
    with pytest.raises(ValueError, match="layer 'augmentation' is a TorchScript module, which cannot have hooks"):
        trainer(tmp_path, LogMECallback(layers=["augmentation"])).validate(module, loader(), verbose=False)
    assert hooks(module) == 0


def test_features_and_layers_may_run_the_same_modules(tmp_path):
    callback = LogMECallback(
        layers=["model.0"], features=lambda module, batch: module.model[0](batch[0]), num_classes=CLASSES
    )
    trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)
    first, second = callback.history
    assert first["logme"] == pytest.approx(second["logme"], rel=1e-6)
    assert (first["key"], second["key"]) == ("logme", "logme/model.0")
