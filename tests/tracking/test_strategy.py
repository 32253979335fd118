"""Strategies that wrap the module, or hold its weights only while they are used."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from models import Classifier, hooks, loader, penultimate, trainer, vectors
from torch import nn

from lightning_logme import LogMECallback
from lightning_logme.functional import logme


class Engine(nn.Module):
    """A stand-in for DeepSpeed's engine: it holds the weights of a layer only while the layer runs (ZeRO-3)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.handles = []
        self.weights = {}
        for layer in module.modules():
            if list(layer.parameters(recurse=False)):
                self.handles += [
                    layer.register_forward_pre_hook(self.gather),
                    layer.register_forward_hook(self.release),
                ]
                self.release(layer)

    def gather(self, layer, *_):
        for parameter in layer.parameters(recurse=False):
            parameter.data = self.weights.pop(parameter)

    def release(self, layer, *_):
        for parameter in layer.parameters(recurse=False):
            self.weights[parameter] = parameter.data
            parameter.data = torch.empty(0)

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


class EngineStrategy(SingleDeviceStrategy):
    def setup(self, trainer):
        super().setup(trainer)
        self.model = Engine(self.model)

    def teardown(self):
        for handle in self.model.handles:
            handle.remove()
        for parameter, weight in self.model.weights.items():
            parameter.data = weight
        super().teardown()


def test_weights_that_are_gathered_for_each_layer_are_scored(tmp_path):
    """DeepSpeed itself needs a GPU under Lightning."""
    module, callback = Classifier(), LogMECallback(layers=["model.0"])
    expected = logme(*penultimate(module, "model.2", vectors()))
    strategy = EngineStrategy(torch.device("cpu"))
    trainer(tmp_path, callback, strategy=strategy).validate(module, loader(), verbose=False)
    assert callback.history[0]["logme"] == pytest.approx(float(expected), rel=1e-6)
    assert len(callback.history) == 2
    assert hooks(module) == 0
    assert all(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_features_callable_is_refused_where_weights_are_sharded(tmp_path, name):
    """Tested with stand-ins of these names: only one of the strategies runs without a GPU."""
    run = SimpleNamespace(world_size=2, strategy=type(name, (), {})())
    callback = LogMECallback(features=lambda module, batch: batch[0], num_classes=4)
    with pytest.raises(ValueError, match=f"features: a callable runs extra forward passes, but under {name}"):
        callback.setup(run, Classifier(), "fit")


def test_unconnected_processes_are_not_scored_with_a_warning(tmp_path):
    run = SimpleNamespace(world_size=2, strategy=type("XLAStrategy", (), {})())
    callback = LogMECallback()
    with pytest.warns(UserWarning, match="logme will not be scored: the 2 processes of XLAStrategy are not connected"):
        callback.setup(run, Classifier(), "fit")


def test_validations_by_the_clock_are_not_scored_with_a_warning():
    """Each process would validate at a time of its own clock."""
    mesh = SimpleNamespace(device_mesh=None)
    run = SimpleNamespace(world_size=2, strategy=mesh, _val_check_time_interval=1.0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.warns(UserWarning, match="logme will not be scored: with a time for val_check_interval"):
            LogMECallback().setup(run, Classifier(), "fit")
    finally:
        dist.destroy_process_group()


def test_probes_of_unconnected_processes_are_not_run(tmp_path):
    run = SimpleNamespace(
        world_size=2, strategy=type("XLAStrategy", (), {})(), enable_validation=False, sanity_checking=False
    )
    module, callback = Classifier(), LogMECallback(probes={"same": loader()})
    with pytest.warns(UserWarning, match="logme will not be scored"):
        callback.setup(run, module, "fit")
    callback.on_fit_start(run, module)
    callback.on_train_start(run, module)
    callback.on_train_epoch_end(run, module)
    callback.on_exception(run, module, RuntimeError())
    assert callback.history == []
    assert hooks(module) == 0
