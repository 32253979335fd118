"""Where labels and masks are in a batch."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch

from lightning_logme.features.labels import conform_target, describe_target, find_mask, find_target

X = torch.randn(5, 16)


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
    def test_labels_are_found_in_the_usual_forms(self, batch):
        assert find_target(batch) is self.y

    def test_target_names_the_labels(self):
        assert find_target({"a": X, "b": self.y}, "b") is self.y
        assert find_target((X, X, self.y), 2) is self.y
        assert find_target((X, X, self.y), -1) is self.y
        assert find_target(SimpleNamespace(mood=self.y), "mood") is self.y
        assert find_target({"a": {"b": self.y}}, lambda batch: batch["a"]["b"]) is self.y

    @pytest.mark.parametrize(
        ("batch", "target", "message"),
        [
            (X, None, r"no labels found in a batch that is a Tensor; set target to the key"),
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
    def test_missing_labels_raise_and_show_the_batch(self, batch, target, message):
        with pytest.raises(ValueError, match=message):
            find_target(batch, target)

    def test_labels_are_brought_to_the_form_of_the_task(self):
        assert conform_target(self.y[:, None], "multiclass").shape == (5,)
        assert conform_target(self.y[3], "multiclass").tolist() == [3]
        binary = conform_target(torch.tensor([[0.0], [1.0]]), "binary")
        assert binary.tolist() == [0, 1]
        assert conform_target(torch.tensor([0.5, 1.0]), "binary").is_floating_point()  # for the metric to refuse
        assert conform_target(self.y[:, None].float(), "regression").shape == (5, 1)

    def test_rivals_of_the_labels_are_described(self):
        x, y = X, self.y
        assert describe_target((x, y)) == ("batch[1]", None)
        assert describe_target((x, y, x)) == ("batch[1]", None)
        assert describe_target((x, y, y)) == ("batch[1]", "batch[2]")
        assert describe_target((x, y, y), -1) == ("target=-1", None)
        assert describe_target({"x": x, "y": y}) == ("batch['y']", None)
        assert describe_target({"labels": y, "label": y, "y": y}) == ("batch['labels']", "batch['label'], batch['y']")
        assert describe_target(self.Named(x, y)) == ("batch['label']", None)

    def test_attention_mask_is_found(self):
        assert find_mask({"attention_mask": self.y}) is self.y
        assert find_mask({"attention_mask": [1]}) is None
        assert find_mask((X, self.y)) is None
