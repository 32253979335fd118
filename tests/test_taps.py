"""Hooks that remember, pooling, and where labels are."""

import copy
import pickle
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from models import mlp
from torch import nn

from lightning_logme.features.hooks import Tap
from lightning_logme.features.labels import conform_target, describe_target, find_mask, find_target

X = torch.randn(5, 16)


def test_input_and_output():
    module = mlp()
    before, after = Tap(module[2], "input", "in"), Tap(module[1], "output", "out")
    module(X)
    expected = module[1](module[0](X))
    before.start(), after.start()
    module(X)
    torch.testing.assert_close(before.take(), expected)
    torch.testing.assert_close(after.take(), expected)
    assert not before.open
    for tap in (before, after):
        tap.remove()
    assert not module[2]._forward_pre_hooks
    assert not module[1]._forward_hooks


def test_never_called_and_called_twice():
    module = mlp()
    tap = Tap(module[2], "input", "the head '2'")
    tap.start()
    with pytest.raises(ValueError, match="the head '2' was not called for this batch.*force_eager"):
        tap.take()
    tap.start()
    module(X), module(X)
    with pytest.raises(ValueError, match="the head '2' was called 2 times for one batch"):
        tap.take()
    tap.start()
    module(X)
    assert tap.take().shape == (5, 32)


def test_keyword_arguments_and_nested_outputs():
    class Odd(nn.Module):
        def forward(self, *, hidden):
            return {"aux": None, "last_hidden_state": hidden + 1, "first": hidden}

    module = Odd()
    before, after = Tap(module, "input", "in"), Tap(module, "output", "out")
    before.start(), after.start()
    module(hidden=X)
    torch.testing.assert_close(before.take(), X)
    torch.testing.assert_close(after.take(), X + 1)


def test_module_without_tensors():
    class Silent(nn.Module):
        def forward(self):
            return None

    module = Silent()
    tap = Tap(module, "output", "layer 'x'")
    tap.start()
    module()
    with pytest.raises(ValueError, match="layer 'x' was called without a tensor"):
        tap.take()


def test_in_place_activation_after_a_layer():
    module = nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True))
    tap = Tap(module[0], "output", "layer")
    tap.start()
    module(X)
    torch.testing.assert_close(tap.take(), module[0](X))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_the_users_module_can_be_copied(copied):
    module = mlp()
    taps = [Tap(module[2], "input", "in"), Tap(module[2], "output", "out")]
    for tap in taps:
        tap.start()
    module(X)
    other = copied(module)
    torch.testing.assert_close(other(X), module[2](module[1](module[0](X))))
    (hook,) = other[2]._forward_pre_hooks.values()
    assert hook.__self__ is not taps[0]
    assert hook.__self__._seen == []
    assert not hook.__self__.open
    assert set(module.state_dict()) == set(mlp().state_dict())


class Prepared(nn.Linear):
    """Says itself what torch.jit.script compiles in its place."""

    def __prepare_scriptable__(self):
        return nn.Identity()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
class TestTorchScript:
    def test_a_scripted_module_holds_no_hooks_and_the_module_keeps_them(self):
        module = mlp()
        taps = [Tap(module[2], "input", "in"), Tap(module[2], "output", "out"), Tap(module[1], "output", "layer")]
        scripted = torch.jit.script(module)
        torch.testing.assert_close(scripted(X), module(X))
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in scripted.modules())
        for _ in range(2):
            for tap in taps:
                tap.start()
            output = module(X)
            torch.testing.assert_close(taps[0].take(), taps[2].take())
            torch.testing.assert_close(taps[1].take(), output)
        for tap in taps:
            tap.remove()
        for part in module:
            assert "__prepare_scriptable__" not in vars(part)
            assert not part._forward_hooks
            assert not part._forward_pre_hooks
            assert not part._forward_pre_hooks_with_kwargs

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_a_copy_can_be_scripted_and_the_original_keeps_its_hooks(self, copied):
        module = mlp()
        tap = Tap(module[2], "input", "in")
        torch.testing.assert_close(torch.jit.script(copied(module))(X), module(X))
        tap.start()
        module(X)
        assert tap.take().shape == (5, 32)

    def test_a_module_that_prepares_itself_still_does(self):
        module = Prepared(16, 16)
        Tap(module, "output", "out")
        assert torch.equal(torch.jit.script(module)(X), X)


class TestTarget:
    y = torch.arange(5)
    Named = namedtuple("Named", ["x", "label"])

    @pytest.mark.parametrize(
        "batch",
        [
            (X, y),
            [X, y],
            (X, y, "meta"),
            ((X, X), y),
            {"input": X, "labels": y},
            {"input": X, "label": y},
            {"input": X, "target": y},
            {"input": X, "y": y},
            UserDict(input_ids=X, labels=y),
            SimpleNamespace(x=X, y=y),
            Named(X, y),
        ],
    )
    def test_usual_forms(self, batch):
        assert find_target(batch) is self.y

    def test_told(self):
        assert find_target({"a": X, "b": self.y}, "b") is self.y
        assert find_target((X, X, self.y), 2) is self.y
        assert find_target((X, X, self.y), -1) is self.y
        assert find_target(SimpleNamespace(mood=self.y), "mood") is self.y
        assert find_target({"a": {"b": self.y}}, lambda batch: batch["a"]["b"]) is self.y

    @pytest.mark.parametrize(
        ("batch", "target", "message"),
        [
            (X, None, r"no labels found in a batch that is a Tensor; .*target= takes"),
            ((X,), None, "no labels found in a batch that is a tuple of 1"),
            ({"image": X}, None, "no labels found in a batch that is a dict with keys 'image'"),
            (
                {"image": X},
                "labels",
                "target='labels' does not lead to labels in a batch that is a dict with keys 'image'",
            ),
            ((X, X), 2, "target=2 does not lead to labels in a batch that is a tuple of 2"),
            (SimpleNamespace(), "y", "target='y' does not lead to labels in a batch that is a SimpleNamespace"),
            (
                (X, [1, 2]),
                None,
                r"must be a torch.Tensor, got list from a batch that is a tuple of 2 \(Tensor, list\)",
            ),
        ],
    )
    def test_not_there(self, batch, target, message):
        with pytest.raises(ValueError, match=message):
            find_target(batch, target)

    def test_form(self):
        assert conform_target(self.y[:, None], "multiclass").shape == (5,)
        assert conform_target(self.y[3], "multiclass").tolist() == [3]
        binary = conform_target(torch.tensor([[0.0], [1.0]]), "binary")
        assert binary.tolist() == [0, 1]
        assert (
            conform_target(torch.tensor([0.5, 1.0]), "binary").is_floating_point()
        )  # for the metric to refuse assert conform_target(self.y[:, None].float(), "regression").shape == (5, 1)

    def test_what_else_could_be_labels(self):
        x, y = X, self.y
        assert describe_target((x, y)) == ("batch[1]", None)
        assert describe_target((x, y, x)) == ("batch[1]", None)
        assert describe_target((x, y, y)) == ("batch[1]", "batch[2]")
        assert describe_target((x, y, y), -1) == ("target=-1", None)
        assert describe_target({"x": x, "y": y}) == ("batch['y']", None)
        assert describe_target({"labels": y, "label": y, "y": y}) == ("batch['labels']", "batch['label'], batch['y']")
        assert describe_target(self.Named(x, y)) == ("batch['label']", None)

    def test_mask(self):
        assert find_mask({"attention_mask": self.y}) is self.y
        assert find_mask({"attention_mask": [1]}) is None
        assert find_mask((X, self.y)) is None
