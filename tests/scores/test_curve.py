"""A curve has a point wherever the number of samples has doubled."""

import pytest
import torch

from lightning_logme.scores.curve import segments


@pytest.mark.parametrize(
    ("task", "num_outputs", "first"),
    [("multiclass", 4, 32), ("multiclass", 50, 100), ("binary", 2, 32), ("multilabel", 50, 32), ("regression", 50, 32)],
)
def test_segments_end_where_the_number_of_samples_has_doubled(task, num_outputs, first):
    found = segments(torch.arange(8 * first), task, num_outputs)
    assert found.tolist() == sorted(found.tolist())
    assert found.bincount().tolist() == [first, first, 2 * first, 4 * first]
