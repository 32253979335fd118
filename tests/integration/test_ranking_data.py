"""Rankings of all kinds of data: map-style data sets, streams, lists of batches, and loaders that are refused."""

import math

import pytest
import torch
from backbones import QUIET, Columns, Stream, good_to_bad, target_loader, target_set
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_logme import rank_backbones
from lightning_logme.functional import logme


def expected_score(n=600):
    """Return the score of the candidate "good" on all samples."""
    x, y = target_set(n).tensors
    return float(logme(x[:, :8], y))


def test_rare_classes_have_evidence_from_the_first_round():
    labels = torch.arange(800) % 100
    data = TensorDataset(torch.randn(100, 8)[labels] + 0.1 * torch.randn(800, 8), labels)
    ranking = rank_backbones({"a": nn.Identity()}, DataLoader(data, 50), **{**QUIET, "num_classes": 100})
    assert ranking.curves["a"][0].num_samples == 400
    assert not ranking.evidence["a"].per_output.isnan().any()
    assert math.isfinite(ranking.rows[0].stderr)


def test_labels_changed_by_a_transform_are_read_from_the_batches():
    """The data set has a transform of its targets, as torchvision's `target_transform`."""

    class Folder(Dataset):
        x, y = target_set().tensors
        targets = (y + 10).tolist()

        def __len__(self):
            return 600

        def __getitem__(self, index):
            return self.x[index], self.targets[index] - 10

    ranking = rank_backbones(good_to_bad(), DataLoader(Folder(), 50), race=False, **QUIET)
    assert ranking.scores["good"] == pytest.approx(expected_score(), abs=1e-9)
    with pytest.raises(ValueError, match="num_classes is needed"):
        rank_backbones(good_to_bad(), DataLoader(Folder(), 50), **{**QUIET, "num_classes": None})


def test_targets_in_bfloat16_strided_or_with_a_graph_are_accepted():
    x, y = target_set().tensors
    wide = torch.stack([y.double(), -y.double()], 1).T.contiguous().T.requires_grad_()
    for target in (wide, wide.bfloat16()):
        options = {**QUIET, "num_classes": None, "task": "regression"}
        ranking = rank_backbones(good_to_bad(), list(DataLoader(TensorDataset(x, target.detach()), 50)), **options)
        assert ranking.rows[-1].ended in ("finished", "dropped")
    loader = [(x[i : i + 60], wide[i : i + 60]) for i in range(0, 600, 60)]
    assert rank_backbones(good_to_bad(), loader, **options).best == "good"


def test_random_state_is_left_alone():
    for loader in (
        DataLoader(target_set(), 50, shuffle=True),
        DataLoader(target_set(), 50, sampler=WeightedRandomSampler([1.0] * 600, 600)),
        DataLoader(Stream(target_set()), 50),
    ):
        state = torch.get_rng_state()
        rank_backbones(good_to_bad(), loader, **QUIET)
        assert torch.equal(torch.get_rng_state(), state)


def test_collate_that_drops_samples_is_refused():
    loader = DataLoader(target_set(), 50, collate_fn=lambda rows: torch.utils.data.default_collate(rows[:-1]))
    with pytest.raises(ValueError, match="dataloader gave 15 labels for a batch of 16 samples"):
        rank_backbones(good_to_bad(), loader, **QUIET)


class Reusing:
    """A loader that writes every batch to the same memory."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __iter__(self):
        batch = [torch.empty_like(tensor[: self.size]) for tensor in self.data.tensors]
        for start in range(0, len(self.data), self.size):
            for reused, tensor in zip(batch, self.data.tensors, strict=True):
                reused.copy_(tensor[start : start + self.size])
            yield tuple(batch)


@pytest.mark.parametrize("kind", ["iterable", "list", "batches of its own"])
def test_all_batches_of_a_stream_are_scored(kind):
    data = target_set()
    loader = {
        "iterable": DataLoader(Stream(data), batch_size=50),
        "list": list(DataLoader(data, batch_size=50)),
        "batches of its own": DataLoader([data[i : i + 50] for i in range(0, 600, 50)], batch_size=None),
    }[kind]
    ranking = rank_backbones(good_to_bad(), loader, race=False, **QUIET)
    assert ranking.best == "good"
    assert ranking.scores["good"] == pytest.approx(expected_score(), abs=1e-9)
    assert [point.num_samples for point in ranking.curves["good"]] == [300, 550, 600]


def test_race_ends_with_the_stream():
    candidates = {"good": Columns(0, 8), "also": Columns(0, 8), "bad": Columns(16, 24)}
    ranking = rank_backbones(candidates, DataLoader(Stream(target_set()), 64), **QUIET)
    assert [row.num_samples for row in ranking.rows] == [600, 600, 256]
    assert [row.ended for row in ranking.rows] == ["finished", "finished", "dropped"]


@pytest.mark.parametrize("length", [256, 512])
def test_stream_may_end_together_with_a_round(length):
    ranking = rank_backbones(
        {"a": Columns(0, 8), "b": Columns(0, 8)}, DataLoader(Stream(target_set(length)), 64), **QUIET
    )
    assert [row.num_samples for row in ranking.rows] == [length, length]
    assert ranking.curves["a"][-1].num_samples == length


def test_stream_sorted_by_class_has_the_right_final_score():
    """The classes come one after the other, so the first points have no evidence."""
    data = target_set(1500)
    order = data.tensors[1].argsort(stable=True).tolist()
    with pytest.warns(UserWarning, match="LogME is NaN: only one class is present in 300 samples"):
        ranking = rank_backbones({"good": Columns(0, 8)}, DataLoader(Stream(data, order), 50), **QUIET)
    assert [math.isnan(point.logme) for point in ranking.curves["good"]] == [True, False, False, False]
    assert ranking.scores["good"] == pytest.approx(expected_score(1500), abs=1e-9)


def test_stream_shuffled_by_the_global_generator_has_one_order():
    """The generator is seeded, so every candidate sees the same order in every round."""
    stream = Stream(target_set(), torch.utils.data.RandomSampler(range(600)))
    candidates = {"good": Columns(0, 8), "also": Columns(0, 8)}
    ranking = rank_backbones(candidates, DataLoader(stream, 50), **QUIET)
    assert ranking.scores["good"] == ranking.scores["also"] == pytest.approx(expected_score(), abs=1e-9)


@pytest.mark.parametrize("candidates", [["a", "b"], ["a"]])
def test_stream_that_changes_its_order_is_refused(candidates):
    generator = torch.Generator()  # not the global generator
    stream = Stream(target_set(), torch.utils.data.RandomSampler(range(600), generator=generator))
    with pytest.raises(RuntimeError, match="the labels of the first batch have changed since the previous pass; datal"):
        rank_backbones({name: Columns(0, 8) for name in candidates}, DataLoader(stream, 50), **QUIET)


def test_stream_that_changes_its_order_after_the_first_batch_is_refused():
    class Changing(IterableDataset):
        reads = 0

        def __iter__(self):
            Changing.reads += 1
            x, y = target_set().tensors
            order = torch.arange(600)
            order[50:] = order[50:].roll(Changing.reads)
            return zip(x[order], y[order], strict=True)

    with pytest.raises(ValueError, match="the labels of 'b' differ from those of an earlier pass; "):
        rank_backbones({"a": Columns(0, 8), "b": Columns(0, 8)}, DataLoader(Changing(), 50), **QUIET)


@pytest.mark.parametrize("candidates", [["a", "b"], ["a"]])
def test_data_set_that_can_be_read_only_once_is_refused(candidates):
    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter(target_set())

        def __iter__(self):
            return self.rows

    with pytest.raises((RuntimeError, ValueError), match=r"labels of the first batch have changed"):
        rank_backbones({name: Columns(0, 8) for name in candidates}, DataLoader(Once(), 50), **QUIET)


def test_interrupt_keeps_finished_candidates():
    class Stops(Columns):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        ranking = rank_backbones(
            {"done": Columns(0, 8), "stops": Stops(0, 8)},
            DataLoader(Stream(target_set()), 50),
            race=False,
            **QUIET,
        )
    assert [(row.name, row.ended, row.num_samples) for row in ranking.rows] == [
        ("done", "finished", 600),
        ("stops", "interrupted", 0),
    ]


def test_loader_may_reuse_its_memory():
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))
    features = torch.randn(60, 100) + torch.eye(3, 100)[labels]
    ranking = rank_backbones(
        {"all": nn.Identity()}, Reusing(TensorDataset(features, labels), 20), **{**QUIET, "num_classes": 3}
    )
    assert ranking.scores["all"] == pytest.approx(float(logme(features, labels)), rel=1e-9)


def test_iterator_is_refused():
    with pytest.raises(ValueError, match="dataloader is an iterator that can be read only once"):
        rank_backbones(good_to_bad(), iter(target_loader()), **QUIET)


@pytest.mark.parametrize(("batches", "message"), [([], "dataloader gave no batch"), (10, "dataloader has 10 samples")])
def test_loader_with_too_few_samples_is_refused(batches, message):
    loader = DataLoader(Stream(target_set(batches)), 5) if batches else []
    with pytest.raises(ValueError, match=message):
        rank_backbones(good_to_bad(), loader, **QUIET)
