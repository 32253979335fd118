"""Ranking.model: its outputs are those of the scored head on the scored features, or it raises."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from backbones import Columns, Net, good_to_bad, rank, target_loader, target_set, tokens
from models import Classifier, ConvNet, images, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lightning_logme import rank_backbones, score_checkpoints

CLASSES = 4


def ranked(candidate, data=None, **options):
    """Return the ranking of one candidate."""
    loader = data if isinstance(data, DataLoader) else DataLoader(images(64) if data is None else data, batch_size=16)
    options = {"num_classes": CLASSES, "accelerator": "cpu", "progress": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LogME")
        return rank_backbones({"net": candidate}, loader, **options)


@torch.no_grad()
def captured(module, name, x):
    """Return the input of a module, or the output of the network if the name is None."""
    seen = []
    module = copy.deepcopy(module).eval()
    if name is None:
        return module(x)
    module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(x)
    return seen[0]


@torch.no_grad()
def check(ranking, features, *args, **kwargs):
    """Check the model against the head on features, and return the model."""
    model = ranking.model()
    head = ranking.head(calibrated=ranking.evidence["net"].temperature is not None)
    outputs = copy.deepcopy(model).eval()(*args, **kwargs)
    outputs = getattr(outputs, "logits", outputs)
    expected = head(features)
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(outputs.argmax(-1), expected.argmax(-1))
    return model


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (ConvNet, "fc"),
        (lambda: timm.create_model("resnet10t", num_classes=7), "fc"),
        (lambda: timm.create_model("test_vit"), "head"),
        (lambda: torchvision.models.mobilenet_v3_small(), "classifier.3"),
        (lambda: nn.Sequential(ConvNet(9), nn.LogSoftmax(1)), "0.fc"),
    ],
    ids=["ConvNet", "resnet10t", "test_vit", "mobilenet_v3_small", "log-softmax"],
)
def test_linear_head_is_replaced(build, head):
    torch.manual_seed(0)
    net = build()
    data = TensorDataset(
        nn.functional.interpolate(images(64).tensors[0], 160 if head == "head" else 48), images(64).tensors[1]
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ranking = ranked(net, data)
    x = data.tensors[0]
    if head == "0.fc":
        model = ranking.model().eval()
        with torch.no_grad():
            expected = ranking.head()(captured(net, head, x)).argmax(1)
            assert torch.equal(model(x).argmax(1), expected)
        return
    model = check(ranking, captured(net, head, x), x)
    assert isinstance(model.get_submodule(head), nn.Linear)
    assert model.get_submodule(head).out_features == CLASSES
    assert model.get_submodule(head).weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {name for name, module in model.named_modules()} == {name for name, module in net.named_modules()}


def test_convolutional_head_is_replaced_by_a_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 1)

        def forward(self, x):
            return self.head(self.body(x).relu()).mean((2, 3))

    net, x = Net(), images(64).tensors[0]
    model = check(ranked(net), captured(net, "head", x).mean((2, 3)), x)
    assert isinstance(model.head, nn.Conv2d)
    assert model.head.weight.shape == (CLASSES, 6, 1, 1)


@pytest.mark.parametrize("normalize", [False, True])
def test_encoder_gets_a_head(normalize):
    net, x = ConvNet().features, images(64).tensors[0]
    features = captured(net, None, x).mean((2, 3))
    features = nn.functional.normalize(features) if normalize else features
    check(ranked(net, normalize=normalize), features, x)


@pytest.mark.parametrize("pooling", ["auto", "cls", lambda output: output.amax(1)])
def test_text_encoder_is_pooled_under_its_mask(pooling):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    net = BertModel(config, add_pooling_layer=False)
    ids, mask = torch.randint(50, (64, 7)), torch.arange(7) < torch.randint(1, 8, (64, 1))
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": y % CLASSES}
        for y, (i, m) in enumerate(zip(ids, mask.long(), strict=True))
    ]
    ranking = ranked(net, DataLoader(rows, batch_size=16), pooling=pooling)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    with torch.no_grad():
        hidden = copy.deepcopy(net).eval()(**inputs).last_hidden_state
    if pooling == "auto":
        features = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        features = hidden[:, 0] if pooling == "cls" else hidden.amax(1)
    check(ranking, features, **inputs)
    check(ranking, features, **inputs, labels=torch.zeros(64))


def test_sequence_classifier_computes_its_loss_with_the_new_classes():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    net, ids = BertForSequenceClassification(config).eval(), torch.randint(50, (64, 7))
    rows = [{"input_ids": i, "labels": y % CLASSES} for y, i in enumerate(ids)]
    ranking = ranked(net, DataLoader(rows, batch_size=16))
    model = check(ranking, captured(net, "classifier", ids), input_ids=ids)
    labels = torch.arange(64) % CLASSES
    output = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert net.num_labels == net.config.num_labels == 2


@pytest.mark.parametrize("normalize", [False, True])
def test_token_classifier_keeps_one_output_for_each_token(normalize):
    net, data = Net(), tokens()
    features = captured(net, "head", data.tensors[0])
    features = nn.functional.normalize(features, dim=-1) if normalize else features
    check(ranked(net, data, normalize=normalize), features, data.tensors[0])


def test_checkpoint_is_loaded(tmp_path):
    """The module of a checkpoint is a LightningModule, and its head is inside."""
    module, data = Classifier(ConvNet()), images(64)
    torch.save({"state_dict": Classifier(ConvNet()).state_dict()}, tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LogME")
        ranking = score_checkpoints(module, tmp_path, DataLoader(data, 16), accelerator="cpu", progress=False)
    model = ranking.model()
    assert isinstance(model, Classifier)
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model.model.features[0].weight, loaded["model.features.0.weight"])
    with torch.no_grad():
        expected = ranking.head()(captured(model, "model.fc", data.tensors[0])).argmax(1)
        assert torch.equal(model.eval()(data.tensors[0]).argmax(1), expected)


def test_named_head_of_several_layers_is_replaced_and_its_input_is_pooled():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3)
            self.top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 9))

        def forward(self, x):
            return self.top(self.body(x))

    net, x = Net(), images(64).tensors[0]
    check(ranked(net, head="top"), captured(net, "top", x).mean((2, 3)), x)


def test_regression_and_calibration():
    x, labels = target_set(200).tensors
    target = torch.stack([x[:, 0] + x[:, 1], labels.double()], 1).float()
    net = Columns(0, 8)
    ranking = ranked(net, TensorDataset(x, target), task="regression", num_classes=None)
    check(ranking, x[:, :8], x)
    ranking = ranked(net, TensorDataset(x, labels))
    ranking.evidence["net"] = replace(ranking.evidence["net"], temperature=0.1)
    plain, model = ranking.head(dtype=torch.float64), check(ranking, x[:, :8], x)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), (plain(x[:, :8].double()) - 0.5) * 10, rtol=1e-4, atol=1e-4)


def test_factory_is_called_with_the_seed_and_generators_are_restored():
    x, y = images(64).tensors
    ranking = ranked(ConvNet, TensorDataset(x, y), seed=5)
    state = torch.get_rng_state()
    one, other = ranking.model(), ranking.model("net")
    assert torch.equal(torch.get_rng_state(), state)
    assert one is not other
    torch.manual_seed(5)
    features = captured(ConvNet(), "fc", x)
    check(ranking, features, x)
    assert torch.equal(one(x), other(x))


def test_model_is_trained_by_a_trainer(tmp_path):
    data = images(64)
    ranking = ranked(ConvNet(), data)
    classifier = Classifier(ranking.model(), lr=0.01)
    before = classifier.model.fc.weight.detach().clone()
    trainer(tmp_path, max_epochs=1).fit(classifier, DataLoader(data, 16), DataLoader(data, 16))
    assert not torch.equal(classifier.model.fc.weight, before)


class Picks(nn.Module):
    """Its head makes an output for each token, and the last one is taken."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(24, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).tanh())[:, -1]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Picks, {}, "uses the head in another way"),
        (lambda: nn.Linear(24, 6), {"forward": lambda model, batch: model(batch[0]).tanh()}, "output of forward="),
        (lambda: nn.Sequential(nn.Linear(24, 6), nn.Linear(6, 9)), {"head": ["0", "1"]}, "2 heads together"),
        (lambda: nn.Sequential(nn.Linear(24, 6), nn.Linear(6, 9)), {"head": "0"}, "does not run with another head"),
    ],
    ids=["token", "forward", "heads", "inner"],
)
def test_model_that_would_differ_is_refused(build, options, message):
    x, y = target_set(200).tensors
    x = x.unflatten(1, (1, 24)).repeat(1, 3, 1) * torch.tensor([1.0, 2.0, -3.0])[:, None] if build is Picks else x
    ranking = ranked(build(), TensorDataset(x, y), **options)
    with pytest.raises(ValueError, match=f"model: 'net' .*{message}.*ranking.head\\(name\\)"):
        ranking.model()


def test_pooling_of_the_ranking_may_fit_the_model():
    x, y = target_set(200).tensors
    x = x.unflatten(1, (1, 24)).repeat(1, 3, 1) * torch.tensor([1.0, 2.0, -3.0])[:, None]
    net = Picks()
    check(ranked(net, TensorDataset(x, y), pooling="last"), captured(net, "head", x)[:, -1], x)


def test_rows_without_a_model_are_refused():
    ranking = ranked(Net(), target_set(200), layers=["low"])
    with pytest.raises(ValueError, match="'net/low' is scored inside the network"):
        ranking.model("net/low")
    with pytest.raises(KeyError, match="no evidence for 'other'"):
        ranking.model("other")
    loaded = pickle.loads(pickle.dumps(ranking))
    with pytest.raises(ValueError, match="holds no candidates"):
        loaded.model("net")
    assert str(loaded) == str(ranking)
    assert repr(loaded) == repr(ranking)


def test_best_candidate_is_the_default():
    ranking = rank(good_to_bad(), target_loader())
    x = target_set().tensors[0]
    with torch.no_grad():
        expected = ranking.head()(good_to_bad()["good"](x)).argmax(1)
        assert torch.equal(ranking.model()(x).argmax(1), expected)
