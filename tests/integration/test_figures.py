"""Figures of layers and curves are logged where there is something new to show."""

import pytest
from boards import events
from layered import Deep
from lightning.pytorch.loggers import TensorBoardLogger
from models import CLASSES, Classifier, loader, trainer, vectors

from lightning_logme import LogMECallback, Probe


def test_every_validation_has_figures_of_layers_and_samples(tmp_path):
    probes = {"news": loader(vectors(seed=5))}
    callback = LogMECallback(layers=["model.blocks.*"], layer_mean=True, probes=probes, curve=True, plots=True)
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), max_epochs=3, log_every_n_steps=1)
    run.fit(Classifier(Deep(3)), loader(), loader())
    seen = events(tmp_path)
    for prefix in ("logme", "logme/news"):
        for figure in ("gain_by_layer", "gain_by_samples"):
            assert len(seen.Images(f"{prefix}/{figure}")) == 3


@pytest.mark.parametrize("curve", [False, True])
def test_nan_in_one_validation_does_not_end_the_figures(tmp_path, curve):
    class Sometimes(Classifier):
        def forward(self, x):
            return super().forward(x * float("nan") if self.current_epoch == 1 and not self.training else x)

    callback = LogMECallback(layers=["model.blocks.*"], curve=curve, plots=True)
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), max_epochs=3, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="features contain NaN"):
        run.fit(Sometimes(Deep(3)), loader(), loader())
    assert len(events(tmp_path).Images("logme/gain_by_output")) == 2
    assert len(events(tmp_path).Images("logme/gain_by_layer")) == 3


def test_curve_is_drawn_only_for_a_new_result(tmp_path):
    """The second run of the probe fails, so its old curve is not drawn again."""
    calls = []

    def forward(module, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        return module(batch[0])

    probe = Probe([vectors(64).tensors], num_classes=CLASSES, forward=forward)
    callback = LogMECallback(probes={"news": probe}, curve=True, validation=False, plots=True)
    options = {"logger": TensorBoardLogger(tmp_path, "", ""), "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    with pytest.warns(UserWarning, match="logme/news is NaN"):
        trainer(tmp_path, callback, max_epochs=3, **options).fit(Classifier(), loader(), loader())
    assert [point.num_samples for point in callback.curves["logme/news"]] == [32, 64]
    assert len(events(tmp_path).Images("logme/news/gain_by_samples")) == 2
