"""Candidates of rank_backbones, and how they are called."""

import re
from typing import NamedTuple

import pytest
import torch
from backbones import CLASSES, WIDTH, Columns, good_to_bad, rank, target_loader, target_set
from models import ConvNet, VisionTransformer, hooks, images
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lightning_logme.functional import logme


def test_ranking_leaves_modules_unchanged():
    model = ConvNet().train()
    model.fc.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = images()
    state = torch.get_rng_state()
    rank({"net": model, "made": ConvNet}, DataLoader(data, 16, shuffle=True), head="auto", num_classes=4)
    assert model.training
    assert not model.fc.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks(model) == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision_leaves_the_module_unchanged(precision):
    model = nn.Linear(WIDTH, 8)
    weight = model.weight.detach().clone()
    data = target_set()
    ranking = rank({"net": model}, DataLoader(data, 50), precision=precision)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, weight)
    with torch.no_grad():
        expected = float(logme(model.double()(data.tensors[0].double()), data.tensors[1]))
    assert ranking.scores["net"] == pytest.approx(expected, abs=1e-9 if precision == "64-true" else 2e-2)


@pytest.mark.parametrize(
    ("model", "head", "width"),
    [(ConvNet(), "auto", 8), (ConvNet(), "fc", 8), (ConvNet(), None, 4), (VisionTransformer(), "heads.head", 16)],
)
def test_head_selects_the_feature(model, head, width):
    ranking = rank({"net": model}, DataLoader(images(), 16), head=head, num_classes=4)
    assert ranking.rows[0].num_features == width


def test_options_can_differ_by_candidate():
    backbone = VisionTransformer().patches  # maps (N, 16, 3, 3)
    candidates = {"mean": backbone, "first": backbone, "head": ConvNet(), "own": ConvNet()}
    ranking = rank(
        candidates,
        DataLoader(images(), 16),
        num_classes=4,
        head={"head": "fc"},
        pooling={"first": lambda features: features[:, :, 0, 0]},
        forward={"own": lambda model, batch: model.features(batch[0])[:, :3]},
    )
    assert {row.name: row.num_features for row in ranking.rows} == {"mean": 16, "first": 16, "head": 8, "own": 3}
    assert len(set(ranking.scores.values())) == 4


def test_a_transform_applies_to_its_candidate_alone():
    x, y = target_set().tensors
    ranking = rank(
        {"raw": nn.Identity(), "first": nn.Identity(), "inputs only": nn.Identity()},
        transforms={
            "first": lambda batch: (batch[0][:, :8], batch[1]),
            "inputs only": lambda batch: batch[0][:, 8:],
        },
        race=False,
    )
    assert {row.name: row.num_features for row in ranking.rows} == {"raw": 24, "first": 8, "inputs only": 16}
    assert ranking.scores["first"] == pytest.approx(float(logme(x[:, :8], y)), abs=1e-9)


def test_a_factory_is_called_in_each_round_with_the_same_seed():
    made = []

    def factory():
        made.append(nn.Linear(WIDTH, 6))
        return made[-1]

    ranking = rank({"random": factory, **good_to_bad()}, target_loader(2000), race=False)
    (row,) = (row for row in ranking.rows if row.name == "random")
    assert row.ended == "finished"
    assert len(made) == 1  # one pass without a race
    made.clear()
    rank({"random": factory, "also": factory}, target_loader(2000))
    assert len(made) > 2
    assert all(torch.equal(made[0].weight, other.weight) for other in made)


def test_a_factory_that_makes_another_network_is_detected():
    generator = torch.Generator()  # rankings seed the default generator

    class Random(Columns):
        def __init__(self):
            super().__init__(0, 8)
            self.weight = nn.Parameter(torch.eye(8) + 0.01 * torch.randn(8, 8, generator=generator))

        def forward(self, x):
            return super().forward(x) @ self.weight

    ranking = rank({"new": Random, "good": Columns(0, 8)}, target_loader(2000))
    assert [(row.name, row.ended, row.num_samples) for row in ranking.rows] == [
        ("good", "finished", 2000),
        ("new", "failed", 256),
    ]
    assert re.match(
        r"its factory built a different network this time \(its features of the first samples changed: .*\); it must",
        ranking.rows[1].message,
    )
    assert ranking.rows[1].logme == ranking.curves["new"][0].logme
    other_head = iter(range(3, 99))  # the features stay the same
    candidates = {"new": lambda: nn.Sequential(Columns(0, 8), nn.Linear(8, next(other_head))), "good": Columns(0, 8)}
    assert {row.ended for row in rank(candidates, target_loader(2000)).rows} == {"finished"}


def test_outputs_that_share_memory_are_copied():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("output", torch.zeros(50, WIDTH))

        def forward(self, x):
            self.output[: len(x)] = x
            return self.output[: len(x)]

    ranking = rank({"buffered": Buffered(), "plain": nn.Identity()}, race=False)
    assert ranking.scores["buffered"] == ranking.scores["plain"]


def test_a_candidate_that_writes_to_its_inputs_does_not_affect_another():
    batches = list(target_loader())
    before = batches[0][0].clone()
    candidates = {"relu": nn.Sequential(nn.ReLU(inplace=True)), "plain": nn.Identity()}
    ranking = rank(candidates, batches, race=False)
    assert ranking.scores["plain"] == pytest.approx(rank({"plain": nn.Identity()}).scores["plain"], abs=1e-9)
    assert torch.equal(batches[0][0], before)


def test_an_in_place_activation_in_the_head_does_not_change_the_feature():
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, 4))
    model = nn.Sequential(nn.Identity(), head)
    ranking = rank({"tapped": model, "plain": nn.Identity()}, head={"tapped": "1"}, race=False)
    assert ranking.scores["tapped"] == ranking.scores["plain"]


def test_a_tensor_that_a_module_caches_can_be_trained_with():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(WIDTH, 8), None

        def forward(self, x):
            self.scale = torch.linspace(0, 1, 8) if self.scale is None else self.scale
            return self.linear(x) * self.scale

    model = Cached()
    rank({"cached": model})
    model(target_set().tensors[0]).sum().backward()
    assert model.linear.weight.grad is not None


def test_batches_can_be_named_tuples():
    class Pair(NamedTuple):
        x: torch.Tensor
        labels: torch.Tensor

    class Greedy(nn.Module):
        def forward(self, x, labels=None):
            assert labels is None
            return x

    loader = DataLoader([Pair(*row) for row in target_set()], 50)
    assert rank({"a": Greedy()}, loader).scores["a"] == pytest.approx(rank({"a": nn.Identity()}).scores["a"], abs=1e-9)


def test_a_compiled_module_gets_the_arguments_of_its_original():
    torch.compiler.reset()
    x, y = target_set().tensors
    rows = [{"x": a, "index": k, "labels": b} for k, (a, b) in enumerate(zip(x, y, strict=True))]

    class Plain(nn.Module):
        def forward(self, x):
            return x * 2

    ranking = rank({"compiled": torch.compile(Plain(), backend="eager")}, DataLoader(rows, 50))
    assert ranking.rows[0].ended == "finished", ranking.rows[0].message


def test_transformers_are_pooled_under_their_attention_mask():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    labels = torch.arange(64) % CLASSES
    ids = torch.randint(10, 50, (64, 7))
    ids[:, 0] = labels
    ids[::5, 0] = 9  # otherwise the fit would be perfect, and the score would depend on rounding
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    rows = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    model, classifier = BertModel(config), BertForSequenceClassification(config)
    ranking = rank(
        {"mean": model, "cls": model, "head": classifier, "layer 0": model},
        DataLoader(rows, 16),
        pooling={"cls": "cls"},
        head={"head": "auto", "layer 0": "encoder.layer.1"},
    )
    assert all(row.num_features == 16 and row.ended == "finished" for row in ranking.rows), str(ranking)
    with torch.no_grad():
        hidden = model.eval()(ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert ranking.scores["mean"] == pytest.approx(float(logme(mean, labels)), abs=1e-5)
    assert ranking.scores["cls"] == pytest.approx(float(logme(hidden[:, 0], labels)), abs=1e-5)


def test_batches_can_be_mappings():
    x, y = target_set().tensors
    rows = [{"image": image, "label": label} for image, label in zip(x, y, strict=True)]
    ranking = rank(loader=DataLoader(rows, 50))
    assert ranking.scores == pytest.approx(rank().scores, abs=0.05)  # the same samples in another order


class TestWhichFeature:
    """``head="auto"``: the input of the layer that makes the output, or the output if there is no such layer."""

    @pytest.mark.parametrize(
        ("model", "feature", "width"),
        [
            (nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3)), "input of '2'", 8),
            (nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(1)), "input of '2'", 8),
            (nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU()), "output", 8),
            (nn.Sequential(nn.Linear(WIDTH, 8), nn.LayerNorm(8)), "output", 8),
            (nn.Linear(WIDTH, 8), "output", 8),
            (nn.Identity(), "output", WIDTH),
            (nn.Sequential(nn.Unflatten(1, (4, 6)), nn.Conv1d(4, 7, 1), nn.Flatten()), "input of '1'", 4),
        ],
    )
    def test_the_feature_is_found_by_running_one_batch(self, model, feature, width):
        ranking = rank({"net": model}, race=False)
        assert (ranking.rows[0].feature, ranking.rows[0].num_features) == (feature, width)
        assert feature in str(ranking)
        assert f"| {feature} | {width} |" in ranking.to_markdown()

    def test_finding_the_feature_takes_no_extra_forward_pass(self):
        class Counted(nn.Sequential):
            seen = 0

            def forward(self, x):
                Counted.seen += len(x)
                return super().forward(x)

        rank({"net": Counted(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))}, race=False)
        assert Counted.seen == len(target_set())

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_a_network_of_torchscript_needs_head_none(self):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3)))
        with pytest.raises(RuntimeError, match="head='auto': no layer of .* called its hooks.*head=None"):
            rank({"net": scripted}, race=False)
        ranking = rank({"net": scripted}, head=None, race=False)
        assert (ranking.rows[0].feature, ranking.rows[0].num_features) == ("output", 3)

    def test_head_none_scores_the_output(self):
        model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))
        ranking = rank({"net": model, "auto": model}, head={"net": None}, race=False)
        assert {row.name: (row.feature, row.num_features) for row in ranking.rows} == {
            "net": ("output", 3),
            "auto": ("input of '2'", 8),
        }

    def test_inputs_of_several_heads_are_concatenated(self):
        class TwoHeads(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 6)
                self.head, self.head_dist = nn.Linear(8, 3), nn.Linear(6, 3)

            def forward(self, x):
                return (self.head(self.left(x)) + self.head_dist(self.right(x))) / 2

        with pytest.raises(RuntimeError, match=r"several heads, .*head=\['head', 'head_dist'\]"):
            rank({"net": TwoHeads()}, race=False)
        ranking = rank({"net": TwoHeads()}, head=["head", "head_dist"], race=False)
        assert (ranking.rows[0].feature, ranking.rows[0].num_features) == ("input of 'head' and 'head_dist'", 14)

    def test_a_custom_forward_returns_features_unless_it_runs_the_classifier(self):
        model = nn.ModuleDict({"backbone": nn.Linear(WIDTH, 8), "projector": nn.Linear(8, 5), "head": nn.Linear(8, 3)})

        def through(*names):
            def forward(module, batch):
                x = batch[0]
                for name in names:
                    x = module[name](x)
                return x

            return forward

        forwards = {"features": through("backbone", "projector"), "logits": through("backbone", "head")}
        ranking = rank(dict.fromkeys(forwards, model), forward=forwards, race=False)
        assert {row.name: (row.feature, row.num_features) for row in ranking.rows} == {
            "features": ("output", 5),
            "logits": ("input of 'head'", 8),
        }
