"""Features on a different device than the run. The device "meta" stands for a second device."""

from types import SimpleNamespace

import pytest
import torch
from streamed import rows_of

from lightning_logme.features.extractor import Extractor, Source
from lightning_logme.features.labels import Labels, Target
from lightning_logme.scores import reduction
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.moments import Moments
from lightning_logme.scores.reduction import reduced
from lightning_logme.scores.scoring import Scoring
from lightning_logme.scores.subset import Subset
from lightning_logme.tracking import validation
from lightning_logme.tracking.validation import Pass

OTHER = torch.device("meta")


@pytest.fixture
def exchanged(monkeypatch):
    """Return a list that collects the devices of exchanged sums. The simulated second process has another source."""
    devices = []

    def all_reduce(moments):
        devices.append({tensor.device for tensor in vars(moments).values()})
        return Moments.zeros(4, 3)

    def with_another(alone, mine, group=None):
        other = {("other", 0): (4, 3, 8, 6, {0})} if isinstance(mine, dict) and mine else type(mine)()
        return [mine, other]

    monkeypatch.setattr(Moments, "all_reduce", all_reduce)
    monkeypatch.setattr(Subset, "add", lambda *args: None)  # Rows on "meta" hold no data.
    monkeypatch.setattr(reduction, "gathered", with_another)
    monkeypatch.setattr(validation, "gathered", lambda alone, mine: [mine, {}])
    monkeypatch.setattr("lightning_logme.utilities.distributed.gathered", lambda alone, mine: [mine, mine])
    return devices


def test_features_of_a_callable_move_to_the_device_of_the_module():
    module = SimpleNamespace(device=OTHER, modules=lambda: ())
    extractor = Extractor(module, [Source("", features=lambda module, batch: torch.ones(5, 4))])
    rows, errors = extractor.rows(None, Labels(Target.checked(torch.arange(5), "multiclass"), None))
    assert errors == {}
    assert rows[""].device == OTHER


@pytest.mark.filterwarnings("ignore:LogME is NaN")
def test_validation_exchanges_sums_on_the_device_of_the_run(exchanged):
    current = Pass(Scoring(num_outputs=3), 0, 2)
    labels = Labels(Target.checked(torch.arange(6) % 3, "multiclass", 3), None)
    assert current.add({"": torch.randn(6, 4)}, labels, range(6)) == {}
    assert len(current.results(OTHER, alone=False)) == 2
    assert exchanged == [{OTHER}, {OTHER}]


@pytest.mark.parametrize("blocks", [0, 5])
def test_ranking_exchanges_sums_on_the_device_of_the_run(exchanged, blocks):
    accumulator = Accumulator("multiclass", 4, 3)
    for block in range(blocks):
        accumulator.add(rows_of(torch.randn(6, 4), torch.arange(6) % 3, num_outputs=3), block)
    accumulator.moments()  # Rows cannot be summed on "meta".
    results, broken = reduced({("mine", 0): accumulator}, "multiclass", OTHER, alone=False)
    assert broken == {}
    assert sorted(results) == [("mine", 0), ("other", 0)]
    assert exchanged == [{OTHER}] * (blocks + 1)
