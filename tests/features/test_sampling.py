"""Which samples a ranking sees, from map-style data sets and from streams."""

import itertools
import math

import pytest
import torch
from backbones import QUIET, Columns, Stream, good_to_bad, target_loader, target_set
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_logme import rank_backbones
from lightning_logme.features.drawing import BLOCKS
from lightning_logme.features.sampling import Samples
from lightning_logme.functional import logme


def samples(loader, task="multiclass", target=None, seed=0):
    return Samples(loader, task, target, seed)


def seen(samples, start=0, stop=None, rank=0, world=1):
    """The identities of the samples, in their order, with their blocks."""
    portions = list(samples.portions(start, stop, rank, world))
    return torch.cat([portion.batch[0] for portion in portions]), torch.cat([portion.block for portion in portions])


def identities(labels):
    return TensorDataset(torch.arange(len(labels)), labels)


class Reusing:
    """A loader that writes all its batches to the same memory."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __iter__(self):
        batch = [torch.empty_like(tensor[: self.size]) for tensor in self.data.tensors]
        for start in range(0, len(self.data), self.size):
            for mine, tensor in zip(batch, self.data.tensors, strict=True):
                mine.copy_(tensor[start : start + self.size])
            yield tuple(batch)


class TestMapStyle:
    def test_every_sample_once_in_an_order_of_the_seed(self):
        loader = DataLoader(identities(torch.randint(4, (500,))), 32, shuffle=True)
        first, _ = seen(samples(loader))
        assert sorted(first.tolist()) == list(range(500))
        assert torch.equal(first, seen(samples(loader))[0])
        assert not torch.equal(first, seen(samples(loader, seed=1))[0])

    def test_rounds_continue_where_the_last_one_ended(self):
        it = samples(DataLoader(identities(torch.randint(4, (4000,))), 50))
        stops = list(it.rounds(4))
        assert stops == [256, 512, 1024, 2048, 4000]
        parts = [seen(it, start, stop)[0] for start, stop in zip([0, *stops], stops, strict=False)]
        assert [len(part) for part in parts] == [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
        assert torch.equal(torch.cat(parts), seen(it)[0])

    @pytest.mark.parametrize(
        ("number", "classes", "rounds"),
        [
            (16, 4, [16]),
            (300, 4, [300]),
            (400, 4, [256, 400]),
            (5000, 500, [2000, 5000]),
            (2100, 4, [256, 512, 1024, 2100]),
        ],
    )
    def test_rounds(self, number, classes, rounds):
        it = samples(DataLoader(identities(torch.zeros(number, dtype=torch.long)), 50))
        assert list(it.rounds(classes)) == rounds

    def test_strata(self):
        """Every beginning and every block has the classes in proportion, rare ones from the start."""
        labels = torch.cat([torch.full((n,), k) for k, n in enumerate((700, 250, 40, 9, 1))])
        order, block = seen(samples(DataLoader(identities(labels), 50)))
        for n in (100, 256, 700):
            counts = labels[order[:n]].bincount(minlength=5)
            expected = labels.bincount() * n / len(labels)
            assert (counts - expected).abs().max() < 3
        assert sorted(labels[order[:5]].tolist()) == [0, 1, 2, 3, 4]
        for k in range(BLOCKS):
            counts = labels[order[block == k]].bincount(minlength=5)
            assert (counts - labels.bincount() / BLOCKS).abs().max() < 1

    def test_blocks_are_about_equal_in_every_round(self):
        it = samples(DataLoader(identities(torch.randint(7, (2000,))), 50))
        _, block = seen(it, 0, 256)
        assert block.bincount(minlength=BLOCKS).min() >= 256 / BLOCKS - 7

    def test_few_shot_classes_have_evidence_from_the_first_round(self):
        labels = torch.arange(800) % 100
        data = TensorDataset(torch.randn(100, 8)[labels] + 0.1 * torch.randn(800, 8), labels)
        ranking = rank_backbones({"a": nn.Identity()}, DataLoader(data, 50), **{**QUIET, "num_classes": 100})
        assert ranking.curves["a"][0].num_samples == 400
        assert not ranking.evidence["a"].per_output.isnan().any()
        assert math.isfinite(ranking.rows[0].stderr)

    @pytest.mark.parametrize("attribute", ["targets", "labels"])
    def test_labels_at_hand(self, attribute):
        class Folder(Dataset):
            """As torchvision's, with a list of labels."""

            def __init__(self):
                setattr(self, attribute, [index * 3 // 90 for index in range(90)])

            def __len__(self):
                return 90

            def __getitem__(self, index):
                return torch.tensor(index), getattr(self, attribute)[index]

        folder = Folder()
        expected = torch.tensor(getattr(folder, attribute))
        for data, chosen in ((folder, torch.arange(90)), (Subset(folder, range(10, 70)), torch.arange(10, 70))):
            it = samples(DataLoader(data, 16))
            order, _ = seen(it)
            assert torch.equal(it.labels, expected[order])
            assert sorted(order.tolist()) == chosen.tolist()

    def test_labels_at_hand_that_are_not_those_of_the_samples(self):
        """As of a data set with a target_transform."""

        class Folder(Dataset):
            x, y = target_set().tensors
            targets = (y + 10).tolist()

            def __len__(self):
                return 600

            def __getitem__(self, index):
                return self.x[index], self.targets[index] - 10

        ranking = rank_backbones(good_to_bad(), DataLoader(Folder(), 50), race=False, **QUIET)
        assert ranking.scores["good"] == pytest.approx(TestStreams().expected(), abs=1e-9)
        with pytest.raises(ValueError, match="num_classes is needed"):
            rank_backbones(good_to_bad(), DataLoader(Folder(), 50), **{**QUIET, "num_classes": None})

    def test_labels_of_odd_kinds(self):
        x, y = target_set().tensors
        wide = torch.stack([y.double(), -y.double()], 1).T.contiguous().T.requires_grad_()
        for target in (wide, wide.bfloat16()):
            options = {**QUIET, "num_classes": None, "task": "regression"}
            ranking = rank_backbones(good_to_bad(), list(DataLoader(TensorDataset(x, target.detach()), 50)), **options)
            assert ranking.rows[-1].ended in ("finished", "dropped")
        loader = [(x[i : i + 60], wide[i : i + 60]) for i in range(0, 600, 60)]
        assert rank_backbones(good_to_bad(), loader, **options).best == "good"

    @pytest.mark.parametrize(
        "sampler",
        [
            SubsetRandomSampler(range(20, 80)),
            [*range(20, 80), 20, 21],
            WeightedRandomSampler([0] * 20 + [1] * 60, 4000),
        ],
    )
    def test_a_sampler_says_which_samples(self, sampler):
        order, _ = seen(samples(DataLoader(identities(torch.arange(100) % 4), 16, sampler=sampler)))
        assert sorted(order.tolist()) == list(range(20, 80))

    def test_a_batch_sampler_says_which_samples(self):
        data = identities(torch.arange(100) % 4)
        for batches in ([[20, 21, 22], list(range(23, 80))], BatchSampler(RandomSampler(data), 8, drop_last=False)):
            order, _ = seen(samples(DataLoader(data, batch_sampler=batches)))
            assert sorted(order.tolist()) == (list(range(20, 80)) if isinstance(batches, list) else list(range(100)))

    def test_a_sampler_of_tensors_and_one_without_end(self):
        class Tensors(list):
            def __iter__(self):
                return (torch.tensor(index) for index in (*range(20, 80), *range(20, 40)))

        data = identities(torch.arange(100) % 4)
        order, _ = seen(samples(DataLoader(data, 16, sampler=Tensors([0] * 80))))
        assert sorted(order.tolist()) == list(range(20, 80))

        class Endless(torch.utils.data.Sampler):
            def __iter__(self):
                return itertools.cycle(range(100))

        order, _ = seen(samples(DataLoader(data, 16, sampler=Endless())), stop=40)
        assert order.tolist() == list(range(48))

    def test_a_loader_with_a_way_of_its_own_is_streamed(self):
        class Doubled(DataLoader):
            def __iter__(self):
                return ((2 * x, y) for x, y in super().__iter__())

        order, _ = seen(samples(Doubled(identities(torch.arange(40) % 4), 16)))
        assert order.tolist() == list(range(0, 80, 2))

    def test_generators_are_left_as_they_were(self):
        for loader in (
            DataLoader(target_set(), 50, shuffle=True),
            DataLoader(target_set(), 50, sampler=WeightedRandomSampler([1.0] * 600, 600)),
            DataLoader(Stream(target_set()), 50),
        ):
            state = torch.get_rng_state()
            rank_backbones(good_to_bad(), loader, **QUIET)
            assert torch.equal(torch.get_rng_state(), state)

    def test_workers_and_collate_are_kept(self):
        def collate(rows):
            assert torch.utils.data.get_worker_info() is not None
            return torch.stack([row[0] for row in rows]) + 1000, torch.stack([row[1] for row in rows])

        data = identities(torch.arange(64) % 4)
        loader = DataLoader(data, 16, collate_fn=collate, num_workers=1, multiprocessing_context="fork")
        order, _ = seen(samples(loader))
        assert sorted(order.tolist()) == list(range(1000, 1064))

    def test_processes_share_the_same_batches(self):
        it = samples(DataLoader(identities(torch.arange(500) % 4), 32))
        alone = [portion.batch[0].tolist() for portion in it.portions(0, 300)]
        shares = [[portion.batch[0].tolist() for portion in it.portions(0, 300, rank, 3)] for rank in range(3)]
        assert [shares[index % 3][index // 3] for index in range(len(alone))] == alone

    def test_a_collate_that_loses_samples(self):
        loader = DataLoader(target_set(), 50, collate_fn=lambda rows: torch.utils.data.default_collate(rows[:-1]))
        with pytest.raises(ValueError, match="dataloader gave 15 labels for a batch of 16 samples"):
            rank_backbones(good_to_bad(), loader, **QUIET)


class TestStreams:
    def expected(self, n=600):
        x, y = target_set(n).tensors
        return float(logme(x[:, :8], y))

    @pytest.mark.parametrize("kind", ["iterable", "list", "batches of its own"])
    def test_all_of_it_is_seen(self, kind):
        data = target_set()
        loader = {
            "iterable": DataLoader(Stream(data), batch_size=50),
            "list": list(DataLoader(data, batch_size=50)),
            "batches of its own": DataLoader([data[i : i + 50] for i in range(0, 600, 50)], batch_size=None),
        }[kind]
        ranking = rank_backbones(good_to_bad(), loader, race=False, **QUIET)
        assert ranking.best == "good"
        assert ranking.scores["good"] == pytest.approx(self.expected(), abs=1e-9)
        assert [point.num_samples for point in ranking.curves["good"]] == [300, 550, 600]

    def test_a_race_ends_with_the_stream(self):
        candidates = {"good": Columns(0, 8), "also": Columns(0, 8), "bad": Columns(16, 24)}
        ranking = rank_backbones(candidates, DataLoader(Stream(target_set()), 64), **QUIET)
        assert [row.num_samples for row in ranking.rows] == [600, 600, 256]
        assert [row.ended for row in ranking.rows] == ["finished", "finished", "dropped"]

    @pytest.mark.parametrize("length", [256, 512])
    def test_a_stream_that_ends_with_a_round(self, length):
        ranking = rank_backbones(
            {"a": Columns(0, 8), "b": Columns(0, 8)}, DataLoader(Stream(target_set(length)), 64), **QUIET
        )
        assert [row.num_samples for row in ranking.rows] == [length, length]
        assert ranking.curves["a"][-1].num_samples == length

    def test_sorted_by_class(self):
        """A class at a time: no evidence at first, the right score in the end."""
        data = target_set(1500)
        order = data.tensors[1].argsort(stable=True).tolist()
        with pytest.warns(UserWarning, match="LogME is NaN: only one class is present in 300 samples"):
            ranking = rank_backbones({"good": Columns(0, 8)}, DataLoader(Stream(data, order), 50), **QUIET)
        assert [math.isnan(point.logme) for point in ranking.curves["good"]] == [True, False, False, False]
        assert ranking.scores["good"] == pytest.approx(self.expected(1500), abs=1e-9)

    def test_shuffled_by_a_global_generator(self):
        """It is seeded, so that every candidate, in every round, has the same order."""
        stream = Stream(target_set(), torch.utils.data.RandomSampler(range(600)))
        candidates = {"good": Columns(0, 8), "also": Columns(0, 8)}
        ranking = rank_backbones(candidates, DataLoader(stream, 50), **QUIET)
        assert ranking.scores["good"] == ranking.scores["also"] == pytest.approx(self.expected(), abs=1e-9)

    @pytest.mark.parametrize("candidates", [["a", "b"], ["a"]])
    def test_another_order_every_time(self, candidates):
        generator = torch.Generator()  # nobody else's
        stream = Stream(target_set(), torch.utils.data.RandomSampler(range(600), generator=generator))
        with pytest.raises(RuntimeError, match="the first batch has other labels than when it was read before; datal"):
            rank_backbones({name: Columns(0, 8) for name in candidates}, DataLoader(stream, 50), **QUIET)

    def test_another_order_after_the_first_batch(self):
        class Changing(IterableDataset):
            reads = 0

            def __iter__(self):
                Changing.reads += 1
                x, y = target_set().tensors
                order = torch.arange(600)
                order[50:] = order[50:].roll(Changing.reads)
                return zip(x[order], y[order], strict=True)

        with pytest.raises(ValueError, match="'b' got other labels than in an earlier pass; "):
            rank_backbones({"a": Columns(0, 8), "b": Columns(0, 8)}, DataLoader(Changing(), 50), **QUIET)

    @pytest.mark.parametrize("candidates", [["a", "b"], ["a"]])
    def test_a_data_set_that_gives_its_samples_once(self, candidates):
        class Once(IterableDataset):
            def __init__(self):
                self.rows = iter(target_set())

            def __iter__(self):
                return self.rows

        with pytest.raises((RuntimeError, ValueError), match=r"other labels than when .* read before"):
            rank_backbones({name: Columns(0, 8) for name in candidates}, DataLoader(Once(), 50), **QUIET)

    def test_blocks_do_not_follow_a_period_of_the_stream(self):
        _, block = seen(samples(DataLoader(Stream(identities(torch.arange(1600) % 8)), 50)))
        labels = torch.arange(1600) % 8
        table = torch.zeros(8, BLOCKS).index_put_((labels, block), torch.ones(1600), accumulate=True)
        assert table.min() > 10  # 25 on average

    def test_interrupted_after_one_has_finished(self):
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

    def test_a_loader_that_uses_its_memory_again(self):
        labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))
        features = torch.randn(60, 100) + torch.eye(3, 100)[labels]
        ranking = rank_backbones(
            {"all": nn.Identity()}, Reusing(TensorDataset(features, labels), 20), **{**QUIET, "num_classes": 3}
        )
        assert ranking.scores["all"] == pytest.approx(float(logme(features, labels)), rel=1e-9)

    def test_read_only_once(self):
        with pytest.raises(ValueError, match="dataloader is an iterator that can be read only once"):
            rank_backbones(good_to_bad(), iter(target_loader()), **QUIET)

    @pytest.mark.parametrize(
        ("batches", "message"), [([], "dataloader gave no batch"), (10, "dataloader has 10 samples")]
    )
    def test_too_short(self, batches, message):
        loader = DataLoader(Stream(target_set(batches)), 5) if batches else []
        with pytest.raises(ValueError, match=message):
            rank_backbones(good_to_bad(), loader, **QUIET)
