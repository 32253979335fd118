"""Features on another device than the run's: "meta" stands for it, where there is no second one."""

from types import SimpleNamespace

import pytest
import torch
from lightning_logme.collector import Collector
from lightning_logme.sources import Source, Sources

from lightning_logme import collector
from lightning_logme.ranking import processes
from lightning_logme.scores.moments import Moments

OTHER = torch.device("meta")


@pytest.fixture
def exchanged(monkeypatch):
    """The devices of the moments that processes would sum."""
    devices = []

    def all_reduce(moments):
        devices.append({tensor.device for tensor in vars(moments).values()})
        return Moments.zeros(4, 3)

    monkeypatch.setattr(Moments, "all_reduce", all_reduce)
    return devices


def test_what_a_callable_returns_is_moved_to_the_device_of_the_module():
    sources = Sources(sources=[Source("", features=lambda module, batch: torch.ones(5, 4))])
    rows, errors = sources.rows(SimpleNamespace(device=OTHER), None, torch.arange(5), None, "multiclass")
    assert errors == {}
    assert rows[""].device == OTHER


@pytest.mark.filterwarnings("ignore:LogME is NaN")
def test_sums_of_a_validation_are_exchanged_on_the_device_of_the_run(exchanged, monkeypatch):
    monkeypatch.setattr(collector, "gathered", lambda alone, mine: [mine, ({("other", 0, 0): (4, 3)}, {})])
    sums = Collector("multiclass", 3)
    assert sums.add(0, {"": torch.randn(6, 4)}, torch.arange(6) % 3, range(6)) == {}
    assert len(list(sums.results(OTHER, alone=False))) == 2
    assert exchanged == [{OTHER}, {OTHER}]


def test_sums_of_a_ranking_are_exchanged_on_the_device_of_the_run(exchanged, monkeypatch):
    monkeypatch.setattr(processes, "everyone", lambda fabric, mine: [mine, 4])
    fabric = SimpleNamespace(world_size=2, device=OTHER)
    for blocks in ([], [Moments.zeros(4, 3) for _ in range(processes.BLOCKS)]):
        exchanged.clear()
        processes.summed(fabric, blocks, 3)
        assert exchanged == [{OTHER}] * processes.BLOCKS
