"""Labels and masks are found in a batch, checked, and paired with rows of features."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from streamed import rows_of

from lightning_logme.features.labels import Target, conform_target, describe_target, find_mask, find_target
from lightning_logme.scores.subset import position_of

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

    def test_target_selects_the_labels(self):
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
        assert conform_target(torch.tensor([0.5, 1.0]), "binary").is_floating_point()  # The metric refuses it.
        assert conform_target(self.y[:, None].float(), "regression").shape == (5, 1)

    def test_chosen_labels_and_their_alternatives_are_described(self):
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


class TestChecked:
    def test_tokens_with_a_label_are_samples(self):
        features, labels = torch.randn(4, 5, 6), torch.arange(20).view(4, 5) % 3
        labels[1, 2] = -100
        target = Target.checked(labels, "multiclass", 3, -100)
        rows = target.rows(features)
        kept = labels.flatten() != -100
        assert target.shape == (4, 5)
        assert torch.equal(target.kept, kept.nonzero()[:, 0])
        assert torch.equal(rows.features, features.flatten(0, 1)[kept])
        assert torch.equal(rows.target, labels.flatten()[kept])
        with pytest.raises(ValueError, match=r"features must have shape \(N, D\), got \(4, 6, 6\)"):
            target.rows(torch.randn(4, 6, 6))
        with pytest.raises(ValueError, match=r"target must have shape \(N,\) for task='multiclass', got \(4, 5\)"):
            target.rows(torch.randn(20, 6))

    def test_checked_target_serves_features_of_several_widths(self):
        target = Target.checked(torch.tensor([0, 1, 2, -1, 1]), "multiclass", 3, -1)
        for width in (3, 7):
            features = torch.randn(5, width)
            assert torch.equal(target.rows(features, width).features, features[[0, 1, 2, 4]])
        with pytest.raises(ValueError, match=r"shape \(N, 3\) as num_features=3, got \(5, 7\)"):
            target.rows(torch.randn(5, 7), 3)

    def test_features_are_not_copied_without_ignored_labels(self):
        features, labels = torch.randn(5, 3), torch.arange(5) % 3
        target = Target.checked(labels, "multiclass", 3, -100)
        assert target.kept is None
        assert target.rows(features).features.data_ptr() == features.data_ptr()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
    def test_normalized_rows_have_length_one(self, dtype, scale):
        features = torch.randn(6, 9).to(dtype) * scale
        features[2] = 0
        rows = Target.checked(torch.arange(6) % 2, "binary").rows(features, normalize=True)
        assert rows.features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        lengths = rows.features.double().norm(dim=1)
        torch.testing.assert_close(lengths, (torch.arange(6) != 2).double(), rtol=1e-5, atol=0)


def test_ignored_label_may_have_any_value():
    labels = torch.tensor([0, -7, 0, -7])
    rows = rows_of(torch.randn(4, 2), labels, num_outputs=1, ignore_index=-7)
    assert rows.target.tolist() == [0, 0]


@pytest.mark.parametrize("ignore_index", [None, 2])
def test_every_sample_and_token_has_its_own_index_in_the_data_set(ignore_index):
    samples = Target.checked(torch.arange(6) % 3, "multiclass", 3, ignore_index).index(range(10, 28, 3))
    assert position_of(samples).tolist() == [10, 13, 19, 22] if ignore_index else list(range(10, 28, 3))
    tokens = Target.checked(torch.arange(12).view(4, 3) % 3, "multiclass", 3, ignore_index).index(range(10, 18, 2))
    each = 2 if ignore_index else 3
    assert position_of(tokens).tolist() == [at for at in range(10, 18, 2) for _ in range(each)]
    assert len(tokens.unique()) == 4 * each
