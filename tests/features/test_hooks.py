"""Hooks capture the inputs or outputs of modules, and pool them inside the hook."""

import copy
import pickle
import weakref

import pytest
import torch
from layered import Encoder
from models import CLASSES, hooks, mlp
from torch import Tensor, nn

from lightning_logme.features.extractor import HEAD, Extractor, Source
from lightning_logme.features.hooks import CallTrace, Capture, Window
from lightning_logme.features.labels import Labels, Target
from lightning_logme.features.selection import Selection, attach

X = torch.randn(5, 16)


def labels_of(number: int, mask: Tensor | None = None) -> Labels:
    return Labels(Target.checked(torch.arange(number) % CLASSES, "multiclass", CLASSES), mask)


LABELS = labels_of(5)


def extractor_of(module: nn.Module, *layers: str, heads=None, pooling="auto") -> Extractor:
    return attach(module, Selection(layers=layers, pooling=pooling), heads)


def captured(extractor: Extractor, labels: Labels = LABELS, *args, known: bool = True, **kwargs) -> dict[str, Tensor]:
    """Return the rows of one call of the network; ``known``: whether its hooks know the labels."""
    extractor.start(labels if known else None)
    extractor.module(*args, **kwargs)
    rows, errors = extractor.rows(None, labels)
    extractor.stop()
    for error in errors.values():
        raise error
    return rows


def test_input_and_output_are_captured_and_hooks_are_removed():
    module = mlp()
    extractor = extractor_of(module, "1", heads=["2"])
    rows = captured(extractor, LABELS, X)
    expected = module[1](module[0](X))
    torch.testing.assert_close(rows[HEAD], expected)
    torch.testing.assert_close(rows["1"], expected)
    assert len(extractor.captures) == 2
    assert not any(capture.is_open or capture.seen for capture in extractor.captures)
    assert hooks(module) == 2
    extractor.remove()
    assert hooks(module) == 0


def test_module_that_is_not_called_once_is_an_error():
    module = mlp()
    extractor = extractor_of(module, heads=["2"])
    extractor.start(LABELS)
    with pytest.raises(ValueError, match="the head '2' was not called for this batch.*force_eager"):
        raise extractor.rows(None, LABELS)[1][HEAD]
    extractor.start(LABELS)
    module(X), module(X)
    with pytest.raises(ValueError, match="the head '2' was called 2 times for one batch"):
        raise extractor.rows(None, LABELS)[1][HEAD]
    assert captured(extractor, LABELS, X)[HEAD].shape == (5, 32)


def test_keyword_arguments_and_nested_outputs_are_captured():
    class Odd(nn.Module):
        def forward(self, *, hidden):
            return {"aux": None, "last_hidden_state": hidden + 1, "first": hidden}

    module = Odd()
    window = Window(CallTrace(module))
    sides = {side: Source(side, [Capture(module, side, side, window)]) for side in ("input", "output")}
    rows = captured(Extractor(module, sides.values(), window), LABELS, hidden=X)
    torch.testing.assert_close(rows["input"], X)
    torch.testing.assert_close(rows["output"], X + 1)


def test_module_without_tensors_is_an_error():
    class Silent(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="layer '0' was called without a tensor"):
        captured(extractor_of(nn.Sequential(Silent()), "0"), LABELS, X)


def test_error_in_a_hook_does_not_end_the_forward_pass():
    module = mlp()
    extractor = extractor_of(module, "0", "1", pooling={"0": lambda rows: rows[0]})
    extractor.start(LABELS)
    module(X)
    rows, errors = extractor.rows(None, LABELS)
    assert list(rows) == ["1"]
    with pytest.raises(ValueError, match=r"layer '0': pooling must return a tensor of shape \(N, D\), got \(32,\)"):
        raise errors["0"]


def captures_in(module: nn.Module) -> list[Capture]:
    """Return the captures among the hooks of a module; torch has no public list of hooks."""
    return [hook.__self__ for hook in module._forward_hooks.values() if isinstance(hook.__self__, Capture)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copy_of_the_users_module_captures_nothing(copied):
    module = mlp()
    extractor = extractor_of(module, "2", heads=["2"])
    extractor.start(LABELS)
    module(X)
    other = copied(module)
    torch.testing.assert_close(other(X), module[2](module[1](module[0](X))))
    (copy_of_capture,) = captures_in(other[2])
    assert copy_of_capture not in extractor.captures
    assert copy_of_capture.seen == []
    assert not copy_of_capture.is_open
    assert set(module.state_dict()) == set(mlp().state_dict())


class Prepared(nn.Linear):
    """A module that names another one for torch.jit.script to compile."""

    def __prepare_scriptable__(self):
        return nn.Identity()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
class TestTorchScript:
    def test_scripted_copy_holds_no_hooks_and_the_module_keeps_them(self):
        module = mlp()
        extractor = extractor_of(module, "1", "2", heads=["2"])
        scripted = torch.jit.script(module)
        torch.testing.assert_close(scripted(X), module(X))
        assert hooks(scripted) == 0
        for _ in range(2):
            rows = captured(extractor, LABELS, X)
            torch.testing.assert_close(rows[HEAD], rows["1"])
            torch.testing.assert_close(rows["2"], module(X))
        extractor.remove()
        assert hooks(module) == 0
        for part in module:
            assert "__prepare_scriptable__" not in vars(part)
            assert not part._forward_pre_hooks_with_kwargs

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copy_can_be_scripted_and_the_original_keeps_its_hooks(self, copied):
        module = mlp()
        extractor = extractor_of(module, heads=["2"])
        torch.testing.assert_close(torch.jit.script(copied(module))(X), module(X))
        assert captured(extractor, LABELS, X)[HEAD].shape == (5, 32)

    def test_module_that_prepares_itself_still_does(self):
        module = nn.Sequential(Prepared(16, 16))
        extractor_of(module, "0")
        assert torch.equal(torch.jit.script(module)(X), X)


class Elementwise(nn.Module):
    """A cheap layer with a visible width, for channels on any axis."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.num_features = width
        self.weight = nn.Parameter(torch.ones(width))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight if self.axis == -1 else self.weight[:, None, None])


MIB = 2**20
TOKENS = (32, 128, 256)  # 4 MiB
POOLINGS = {
    "tokens": (TOKENS, -1, "auto", None),
    "masked tokens": (TOKENS, -1, "auto", torch.arange(128) < torch.arange(1, 33)[:, None]),
    "mean": (TOKENS, -1, "mean", None),
    "cls": (TOKENS, -1, "cls", None),
    "last": (TOKENS, -1, "last", None),
    "masked cls": (TOKENS, -1, "cls", torch.arange(128) >= torch.arange(32)[:, None]),
    "masked last": (TOKENS, -1, "last", torch.arange(128) < torch.arange(1, 33)[:, None]),
    "map, channels first": ((32, 256, 8, 16), 1, "auto", None),
    "map, channels last": ((32, 8, 16, 256), -1, "auto", None),
    "channels_first": ((32, 256, 8, 16), 1, "channels_first", None),
    "channels_last": ((32, 8, 16, 256), -1, "channels_last", None),
    "callable": (TOKENS, -1, lambda tokens: tokens.amax(1), None),
    "callable that returns a view": (TOKENS, -1, lambda tokens: tokens[:, 3], None),
    "callable that returns a view of its own": (TOKENS, -1, lambda tokens: tokens.double()[:, 3], None),
    "callable with weights": (TOKENS, -1, lambda tokens: (tokens * nn.Parameter(torch.ones(256))).mean(1), None),
}
CASES = pytest.mark.parametrize(("shape", "axis", "pooling", "mask"), POOLINGS.values(), ids=POOLINGS)


def twelve_layers(axis: int) -> nn.Sequential:
    return nn.Sequential(*(Elementwise(256, axis) for _ in range(12)))


def held_bytes(extractor: Extractor) -> int:
    """Return the bytes of all storages that the captures keep alive."""
    storages = {}
    for capture in extractor.captures:
        for tensor, _ in capture.seen:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            assert tensor.grad_fn is None  # A graph would keep activations alive.
    return sum(storages.values())


class TestMemory:
    @CASES
    def test_captures_keep_no_activations(self, shape, axis, pooling, mask):
        network, labels = twelve_layers(axis), labels_of(32, mask)
        extractor = extractor_of(network, *map(str, range(12)), pooling=pooling)
        extractor.start(labels)
        network(torch.randn(shape))
        size = 8 if pooling is POOLINGS["callable that returns a view of its own"][2] else 4
        assert all(is_pooled for capture in extractor.captures for _, is_pooled in capture.seen)
        assert held_bytes(extractor) == 12 * 32 * 256 * size < MIB
        extractor.stop()
        assert held_bytes(extractor) == 0

    def test_activations_are_freed_during_the_forward_pass(self):
        """At most the input and the output of one layer are alive at any moment."""
        network, alive = twelve_layers(-1), []
        extractor = extractor_of(network, *map(str, range(12)))
        storages, most = [], 0

        def watch(module, args, output):
            nonlocal most
            storages.append(weakref.ref(output.untyped_storage()))
            alive.append(weakref.ref(output))
            most = max(most, sum(tensor() is not None for tensor in alive))

        for layer in network:
            layer.register_forward_hook(watch)
        extractor.start(labels_of(32))
        with torch.no_grad():
            network(torch.randn(TOKENS))
        assert most <= 2
        assert not any(tensor() is not None for tensor in alive)

    def test_tokens_with_labels_are_kept_whole(self):
        network = twelve_layers(-1)
        target = Target.checked(torch.arange(8 * 16).reshape(8, 16) % CLASSES, "multiclass", CLASSES)
        extractor = extractor_of(network, *map(str, range(12)))
        x = torch.randn(8, 16, 256)
        rows = captured(extractor, Labels(target, None), x)
        assert len(rows) == 12
        assert all(torch.equal(found, x) for found in rows.values())

    def test_activations_are_copied_while_the_labels_are_unknown(self):
        network = twelve_layers(-1)
        extractor = extractor_of(network, *map(str, range(12)))
        extractor.start(None)
        network(torch.randn(TOKENS))
        assert held_bytes(extractor) == 12 * 4 * MIB


class TestPoolingInTheHook:
    @CASES
    def test_equals_pooling_after_the_forward_pass(self, shape, axis, pooling, mask):
        network, labels, x = twelve_layers(axis)[:2], labels_of(32, mask), torch.randn(shape)
        inside = captured(extractor_of(network, "0", "1", pooling=pooling), labels, x)
        after = captured(extractor_of(network, "0", "1", pooling=pooling), labels, x, known=False)
        for name in ("0", "1"):
            assert inside[name].dtype == after[name].dtype
            assert torch.equal(inside[name], after[name])

    @pytest.mark.parametrize("pooling", ["auto", "cls", "last", lambda tokens: tokens.amax(1), lambda t: t[:, 1]])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_activations_that_work_in_place_change_nothing(self, pooling, dtype):
        network, x, labels = Encoder(), torch.randn(8, 5, 6), labels_of(8)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            inside = captured(extractor_of(network, "project", pooling=pooling), labels, x)["project"]
            after = captured(extractor_of(network, "project", pooling=pooling), labels, x, known=False)["project"]
            tokens = network.project(x)
        assert tokens.dtype == (dtype or torch.float32)
        assert (inside < 0).any()
        assert torch.equal(inside, after)
        expected = {"auto": lambda t: t.float().mean(1), "cls": lambda t: t[:, 0], "last": lambda t: t[:, -1]}
        torch.testing.assert_close(inside, expected.get(pooling, pooling)(tokens))

    @pytest.mark.parametrize("pooling", ["auto", "cls", lambda tokens: tokens.amax(1)])
    def test_tensors_of_compiled_code_are_copied_and_pooled_later(self, pooling):
        torch.compiler.reset()
        network, x, labels = Encoder(), torch.randn(8, 5, 6), labels_of(8)
        expected = captured(extractor_of(network, "project", pooling=pooling), labels, x)["project"]
        network = copy.deepcopy(network)
        network.compile(backend="eager")
        extractor = extractor_of(network, "project", pooling=pooling)
        for _ in range(2):
            extractor.start(labels)
            network(x)
            ((tensor, is_pooled),) = extractor.captures[0].seen
            assert tensor.shape == (8, 5, 256)
            assert not is_pooled
            assert torch.equal(extractor.rows(None, labels)[0]["project"], expected)
            extractor.stop()

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
    @pytest.mark.parametrize("pooling", ["auto", "cls", "last"])
    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_nested_tensors_are_pooled_sample_by_sample(self, pooling, known, layout):
        class Nested(nn.Module):
            def forward(self, samples):
                return self.layer(torch.nested.nested_tensor(samples, layout=layout))

        network = Nested()
        network.layer = nn.Linear(6, 4)
        samples = [torch.randn(length, 6) for length in (3, 5, 2)]
        extractor = extractor_of(network, "layer", pooling=pooling)
        rows = captured(extractor, labels_of(3), samples, known=known)["layer"]
        pick = {"auto": lambda t: t.mean(0), "cls": lambda t: t[0], "last": lambda t: t[-1]}[pooling]
        torch.testing.assert_close(rows, torch.stack([pick(network.layer(one)) for one in samples]))

    @pytest.mark.parametrize("known", [True, False])
    def test_sparse_tensors_are_captured(self, known):
        class Sparse(nn.Module):
            def forward(self, x):
                return x.to_sparse()

        rows = captured(extractor_of(nn.Sequential(Sparse()), "0"), LABELS, X, known=known)["0"]
        assert torch.equal(LABELS.target.rows(rows).features, X)

    def test_rows_that_are_pooled_later_keep_no_activation(self):
        """The first token is a view of all tokens, so it must be copied."""
        extractor = extractor_of(nn.Sequential(nn.Linear(6, 5)), "0", pooling="cls")
        rows = captured(extractor, LABELS, torch.randn(len(X), 50, 6), known=False)["0"]
        assert rows.untyped_storage().nbytes() == rows.nbytes
