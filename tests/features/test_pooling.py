"""Tokens and maps become vectors: which axis holds the channels, under which mask, and what is said about it."""

import copy
import pickle

import pytest
import torch
from models import CLASSES, Classifier, hooks, loader, mlp, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback, Probe, rank_backbones
from lightning_logme.features.hooks import CallTrace
from lightning_logme.features.pooling import Call, check_poolings, describe_pooling, find_channel_axis, pool
from lightning_logme.functional import logme

SAMPLES = 40
LABELS = torch.arange(SAMPLES) % CLASSES


class TestPool:
    tokens = torch.randn(3, 7, 4)
    maps = torch.randn(3, 4, 5, 6)

    def test_vectors_stay(self):
        vectors = torch.randn(5, 16)
        assert pool(vectors) is vectors

    def test_tokens(self):
        torch.testing.assert_close(pool(self.tokens), self.tokens.mean(1))
        torch.testing.assert_close(pool(self.tokens, "mean"), self.tokens.mean(1))
        torch.testing.assert_close(pool(self.tokens, "cls"), self.tokens[:, 0])
        torch.testing.assert_close(pool(self.tokens, "last"), self.tokens[:, -1])

    def test_last_token_that_is_not_padding(self):
        right, left = torch.ones(3, 7), torch.ones(3, 7)
        right[1, 4:], left[1, :4] = 0, 0
        torch.testing.assert_close(pool(self.tokens, "last", mask=right)[1], self.tokens[1, 3])
        torch.testing.assert_close(pool(self.tokens, "last", mask=left)[1], self.tokens[1, 6])
        torch.testing.assert_close(pool(self.tokens, "last", mask=right)[0], self.tokens[0, 6])

    def test_masked_tokens_do_not_count(self):
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[1, 4:] = 0
        tokens = self.tokens.clone()
        tokens[1, 4:] = torch.nan
        pooled = pool(tokens, mask=mask)
        torch.testing.assert_close(pooled[1], self.tokens[1, :4].mean(0))
        torch.testing.assert_close(pooled[0], self.tokens[0].mean(0))
        with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 3\), but there are 7 tokens"):
            pool(self.tokens, mask=mask[:, :3])
        torch.testing.assert_close(pool(self.maps, mask=mask), self.maps.mean((2, 3)))  # which has no tokens

    def test_first_token_that_is_not_padding(self):
        left = torch.ones(3, 7, dtype=torch.long)
        left[1, :4] = 0
        pooled = pool(self.tokens, "cls", mask=left)
        torch.testing.assert_close(pooled[1], self.tokens[1, 4])
        torch.testing.assert_close(pooled[0], self.tokens[0, 0])

    def test_maps(self):
        torch.testing.assert_close(pool(self.maps), self.maps.mean((2, 3)))
        torch.testing.assert_close(pool(self.maps.permute(0, 2, 3, 1), channel_axis=-1), self.maps.mean((2, 3)))
        torch.testing.assert_close(pool(self.maps.to(memory_format=torch.channels_last)), self.maps.mean((2, 3)))
        torch.testing.assert_close(pool(self.maps[:, :, None].repeat(1, 1, 2, 1, 1)), self.maps.mean((2, 3)))

    def test_half_precision_is_averaged_in_single(self):
        low = self.maps.bfloat16()
        torch.testing.assert_close(pool(low), low.float().mean((2, 3)))
        assert pool(self.maps.double()).dtype == torch.float64

    def test_callable(self):
        torch.testing.assert_close(pool(self.maps, lambda x: x.amax((2, 3))), self.maps.amax((2, 3)))
        with pytest.raises(
            ValueError, match=r"pooling must return a tensor of shape \(N, D\), got \(3, 4, 5\) from \(3, 4, 5, 6\)"
        ):
            pool(self.maps, lambda x: x.mean(3))
        with pytest.raises(ValueError, match="got str"):
            pool(self.maps, lambda x: "x")

    def test_bad(self):
        with pytest.raises(ValueError, match=r"pooling='cls' needs tokens .* got \(3, 4, 5, 6\)"):
            pool(self.maps, "cls")
        with pytest.raises(ValueError, match=r"got \(3,\)"):
            pool(self.maps[:, 0, 0, 0])
        with pytest.raises(ValueError, match="pooling must be 'auto', 'mean', 'cls', .* or a callable.*got 'max'"):
            check_poolings("max")


class TestChannelAxis:
    @pytest.mark.parametrize(
        ("shape", "inside", "before", "axis"),
        [
            ((8, 96, 7, 7), [Call(96, (8, 96, 7, 7))], [], 1),
            ((8, 7, 7, 96), [Call(96, (8, 7, 7, 96))], [], -1),
            ((8, 32, 56), [Call(32, (8, 32, 56))], [], 1),
            ((8, 56, 32), [Call(32, (8, 56, 32))], [], -1),
            # a linear layer between two permutations, as in ConvNeXt
            ((8, 96, 7, 7), [Call(96, (8, 96, 7, 7)), Call(384, (8, 7, 7, 384)), Call(96, (8, 7, 7, 96))], [], 1),
            # a concatenation, which no layer is as wide as
            ((8, 48, 7, 7), [Call(32, (8, 32, 7, 7)), Call(16, (8, 16, 7, 7))], [], 1),
            # as many channels as positions
            ((8, 16, 16), [Call(64, (8, 16, 64)), Call(16, (8, 16, 16))], [], -1),
            # an activation
            ((8, 7, 7, 96), [], [Call(3, (8, 3, 28, 28)), Call(96, (8, 7, 7, 96))], -1),
            # an activation of a concatenation whose branches are as wide as the map
            ((8, 1008, 42, 42), [], [Call(42, (8, 42, 83, 83)), Call(42, (8, 42, 42, 42))], 1),
            # an identity behind a permutation
            ((8, 96, 7, 7), [], [Call(96, (8, 7, 7, 96))], 1),
            # patches that become tokens
            ((8, 196, 192), [], [Call(192, (8, 192, 14, 14))], -1),
            # convolutions only, of equal sizes
            ((8, 16, 16, 16), [Call(16, (8, 16, 16, 16), True)], [Call(16, (8, 16, 16, 16), True)], 1),
            ((8, 16, 16, 16), [Call(16, (8, 16, 16, 16), True)], [Call(16, (8, 16, 16, 16))], None),
            ((8, 5, 7), [], [], None),
        ],
    )
    def test_layers_that_ran_decide(self, shape, inside, before, axis):
        assert find_channel_axis(inside, before, shape) == axis

    def test_trace_records_what_ran_inside_a_module_and_before_it(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 2))
        trace = CallTrace(network)
        trace.open([network[1], network[2]])
        network(torch.randn(3, 5, 4))
        trace.close()
        assert hooks(network) == 0
        first, second, third = Call(8, (3, 5, 8)), Call(6, (3, 5, 6)), Call(2, (3, 5, 2))
        assert trace.around(network[1]) == ([second, third], [first])
        assert trace.around(network[2]) == ([third], [first, second])
        assert trace.calls == [first, second, third]

    def test_capture_looks_at_the_trace_as_soon_as_its_module_is_done(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 2))
        trace, seen = CallTrace(network), []
        network[1].register_forward_hook(lambda module, args, output: seen.append(trace.around(module)))
        trace.open([network[1]])
        network(torch.randn(3, 5, 4))
        assert seen == [([Call(6, (3, 5, 6))], [Call(8, (3, 5, 8))])]

    def test_trace_forgets_when_it_is_opened_again(self):
        network = nn.Sequential(nn.Linear(4, 8))
        trace = CallTrace(network)
        for number in (3, 5):
            trace.open([])
            network(torch.randn(number, 4))
            assert trace.calls == [Call(8, (number, 8))]
        trace.close()

    def test_compiled_modules_get_no_hooks_and_count_as_registered(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6))
        network[1].compile(backend="eager")
        trace = CallTrace(network)
        trace.open([network[1]])
        assert hooks(network[1]) == 0
        trace.close()
        assert trace.around(network[1]) == ([Call(6, None)], [Call(8, None)])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_of_a_traced_module_record_nothing(self, copied):
        network = nn.Sequential(nn.Linear(4, 8))
        trace = CallTrace(network)
        trace.open([network[0]])
        copied(network)(torch.randn(3, 4))
        assert trace.calls == []
        trace.close()


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


class TestCallback:
    def test_layers_of_all_layouts_are_scored_at_their_width(self, tmp_path, caplog):
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

    def test_what_nothing_decides_raises_on_the_first_batch_and_names_the_line_to_write(self, tmp_path):
        class Views(Classifier):
            def __init__(self):
                super().__init__(mlp(12))
                self.view = nn.Unflatten(1, (3, 4))

            def forward(self, x):
                return self.model(self.view(x).flatten(1))

        data = TensorDataset(torch.randn(SAMPLES, 12) + LABELS[:, None], LABELS)
        message = (
            r"layer 'view' has shape \(20, 3, 4\).*second axis \(3\).*last \(4\); write pooling={'view': 'channels_f"
        )
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, LogMECallback(layers=["view"])).validate(Views(), loader(data), verbose=False)
        for given, axis in ({"view": "channels_first"}, 2), ({"vie?": "channels_last"}, 1), ("channels_last", 1):
            callback = LogMECallback(layers=["view"], pooling=given)
            trainer(tmp_path, callback).validate(Views(), loader(data), verbose=False)
            expected = logme(data.tensors[0].unflatten(1, (3, 4)).mean(axis), LABELS)
            assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)

    def test_a_mapping_pools_each_layer_its_own_way(self, tmp_path):
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
    """Tokens under an attention mask, pooled by the head's owner to the first of them."""

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
    places = torch.arange(9)
    mask = places >= 9 - lengths[:, None] if left else places < lengths[:, None]
    rows = [
        {"input_ids": row * real, "attention_mask": real.long(), "labels": label}
        for row, real, label in zip(ids, mask, LABELS, strict=True)
    ]
    return DataLoader(rows, batch_size=8)


class TestMasks:
    @pytest.mark.filterwarnings("ignore:LogME has lost digits")  # under left padding the head's token is constant
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


@pytest.mark.parametrize(
    ("shape", "pooling", "axis", "mask", "text"),
    [
        ((8, 5, 6), "auto", -1, None, "averaged over tokens, 6 channels on the last axis"),
        ((8, 5, 6), "mean", -1, torch.ones(8, 5), "averaged over tokens under attention_mask, 6 channels on the last"),
        ((8, 5, 6), "channels_first", None, None, "averaged over positions, 5 channels on the second axis"),
        ((8, 5, 6, 7), "auto", 1, torch.ones(8, 5), "averaged over positions, 5 channels on the second axis"),
        ((8, 5, 6), "cls", None, torch.ones(8, 5), "its first token under attention_mask"),
        ((8, 5, 6), "last", None, None, "its last token"),
        ((8, 5, 6), torch.sum, None, None, "pooled by the callable"),
    ],
)
def test_pooling_is_described_as_it_is_done(shape, pooling, axis, mask, text):
    assert text in describe_pooling(shape, pooling, axis, mask)


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
    """In eval mode torch's encoder makes nested tensors of masked tokens: no padding is left to be averaged."""

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
                for one, kept in zip(tokens, mask, strict=True):  # without any padding
                    rows.append(pick(module.encoder.layers[0](one[kept][None])[0]))
        expected = float(logme(torch.stack(rows), LABELS))
        scores = {row["key"]: row["logme"] for row in callback.history}
        for key in ("logme/encoder.layers.0", "logme/same/encoder.layers.0"):
            assert scores[key] == pytest.approx(expected, abs=1e-4)
        assert all(score == score for score in scores.values())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_of_the_network_is_left_alone(tmp_path):
    module = Classifier()
    module.augmentation = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    callback = LogMECallback(layers=["model.*"], probes={"same": loader()})
    trainer(tmp_path, callback).fit(module, loader(), loader())
    assert all(row["logme"] == row["logme"] for row in callback.history)
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
