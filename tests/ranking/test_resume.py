"""An interrupted ranking is resumed, and anything that has changed is computed anew."""

import re
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from backbones import QUIET, WIDTH, Columns, Counted, Stream, good_to_bad, target_loader, target_set
from spawned import CONTEXT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import rank_backbones


@pytest.fixture
def candidates():
    Counted.seen = 0
    return {"good": Counted(0, 8), "also": Counted(0, 8), "bad": Counted(16, 24)}


def rank(candidates, folder, n=1500, **options):
    return rank_backbones(candidates, target_loader(n), resume_from=folder, **{**QUIET, **options})


@contextmanager
def starts_anew(name, cause):
    with pytest.warns(UserWarning, match="resume_from") as warned:
        yield
    messages = [str(warning.message) for warning in warned]
    assert any(re.match(f"resume_from: '{name}' starts again, because .*({cause})", message) for message in messages), (
        messages
    )


def summary(ranking):
    names = ("name", "logme", "stderr", "accuracy", "accuracy_stderr", "num_samples", "ended", "message")
    return [tuple(getattr(row, name) for name in names) for row in ranking.rows]


def test_a_finished_ranking_is_not_computed_again(candidates, tmp_path):
    first = rank(candidates, tmp_path)
    assert Counted.seen == 2 * 1500 + 256 + 3 * 16  # 16 samples of each candidate identify it later
    Counted.seen = 0
    again = rank(candidates, tmp_path)
    assert summary(again) == summary(first)
    assert again.curves == first.curves
    torch.testing.assert_close(again.evidence["good"].weight, first.evidence["good"].weight)
    assert Counted.seen == 3 * 16  # 16 samples of each candidate show that it is the same


@pytest.mark.parametrize("race", [True, False])
def test_an_interrupted_ranking_keeps_finished_candidates(candidates, tmp_path, race):
    whole = rank_backbones(candidates, target_loader(1500), race=race, **QUIET)

    class Interrupted(Counted):
        def forward(self, x):
            if Counted.seen > (1000 if race else 2000):
                raise KeyboardInterrupt
            return super().forward(x)

    Counted.seen = 0
    stopping = {**candidates, "also": Interrupted(0, 8)}
    with pytest.warns(UserWarning, match="interrupted"):
        rank(stopping, tmp_path, race=race)
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["bad" if race else "good"]
    Counted.seen = 0
    resumed = rank(candidates, tmp_path, race=race)
    assert summary(resumed) == summary(whole)
    assert Counted.seen == 2 * 1500 + 3 * 16  # two candidates start anew; 16 samples recognise each of the three


class Stuck(Counted):
    """Sends a message once 2000 samples were seen, and waits for its process to be killed."""

    def __init__(self, connection):
        super().__init__(0, 8)
        self.connection = connection

    def forward(self, x):
        if Counted.seen > 2000:
            self.connection.send("stuck")
            time.sleep(600)
        return super().forward(x)


def _rank_until_stuck(connection, folder):
    torch.set_num_threads(1)
    rank({"good": Counted(0, 8), "also": Stuck(connection), "bad": Counted(16, 24)}, folder, race=False)


@pytest.mark.slow
def test_a_ranking_whose_process_was_killed_is_resumed(candidates, tmp_path):
    mine, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_rank_until_stuck, args=(theirs, tmp_path))
    process.start()
    theirs.close()
    assert mine.poll(120)
    assert mine.recv() == "stuck"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    Counted.seen = 0
    resumed = rank(candidates, tmp_path, race=False)
    assert Counted.seen == 2 * 1500 + 3 * 16
    assert summary(resumed) == summary(rank_backbones(candidates, target_loader(1500), race=False, **QUIET))


def test_the_only_candidate_left_is_not_computed_again(tmp_path):
    Counted.seen = 0
    candidates = {"good": Counted(0, 8), "bad": Counted(16, 24)}
    first = rank(candidates, tmp_path)
    assert [row.num_samples for row in first.rows] == [256, 256]
    Counted.seen = 0
    assert summary(rank(candidates, tmp_path)) == summary(first)
    assert Counted.seen == 2 * 16


def test_a_dropped_candidate_that_must_continue_starts_anew(tmp_path):
    Counted.seen = 0
    rank({"good": Counted(0, 8), "bad": Counted(16, 24)}, tmp_path)
    Counted.seen = 0
    candidates = {"bad": Counted(16, 24), "as bad": Counted(16, 24)}
    resumed = rank(candidates, tmp_path)
    assert summary(resumed) == summary(rank_backbones(candidates, target_loader(1500), **QUIET))
    assert Counted.seen == 16 + 2 * (1500 + 16) + 2 * 1500
    Counted.seen = 0
    assert summary(rank(candidates, tmp_path)) == summary(resumed)
    assert Counted.seen == 2 * 16


@pytest.mark.parametrize("length", [600, 512])
@pytest.mark.parametrize("race", [True, False])
def test_a_finished_ranking_of_a_stream_is_not_computed_again(tmp_path, race, length):
    """Also if the stream ends with a round, so that its length is known only afterwards."""
    Counted.seen = 0
    candidates = {"good": Counted(0, 8), "also": Counted(0, 8), "bad": Counted(16, 24)}
    loader = DataLoader(Stream(target_set(length)), 64)
    first = rank_backbones(candidates, loader, resume_from=tmp_path, race=race, **QUIET)
    Counted.seen = 0
    again = rank_backbones(candidates, loader, resume_from=tmp_path, race=race, **QUIET)
    assert summary(again) == summary(first)
    assert Counted.seen == 3 * 64  # the first batch of each


def test_a_finished_ranking_of_layers_is_not_computed_again(tmp_path):
    def candidates():
        torch.manual_seed(3)
        return {name: nn.Sequential(Columns(*ends), nn.Linear(8, 6), nn.Tanh()) for name, ends in ENDS.items()}

    options = {"layers": ["0", "1"], "pooling": {"good": {"0": lambda features: features}}}
    first = rank(candidates(), tmp_path, **options)
    again = rank(candidates(), tmp_path, **options)
    assert summary(again) == summary(first)
    assert {row.name for row in first.rows} == {name + end for name in ENDS for end in ("", "/0", "/1")}
    assert again.curves == first.curves
    for name, evidence in first.evidence.items():
        torch.testing.assert_close(again.evidence[name].weight, evidence.weight)
    with starts_anew("good", "layers was .* and is"):
        rank(candidates(), tmp_path, layers=["0"])
    changed = candidates()
    with torch.no_grad():
        changed["good"][1].weight.mul_(1.1)
    with starts_anew("good", "its features of the first samples changed"):
        rank(changed, tmp_path, layers=["0"])


ENDS = {"bad": (16, 24), "good": (0, 8)}


def test_random_numbers_in_a_forward_pass_are_not_taken_for_a_change(tmp_path):
    class Noisy(Columns):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.randn(len(x), 1)

    candidates = {"a": lambda: Noisy(0, 8), "b": lambda: Noisy(0, 8)}
    first = rank(candidates, tmp_path)
    assert {row.ended for row in first.rows} == {"finished"}
    torch.manual_seed(5)
    assert summary(rank(candidates, tmp_path)) == summary(first)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"seed": 1}, "seed was 0 and is 1|labels was"),
        pytest.param({"normalize": True}, "normalize was False and is True", marks=pytest.mark.slow),
        pytest.param({"fit_intercept": True}, "fit_intercept was False and is True", marks=pytest.mark.slow),
        pytest.param({"pooling": {"good": "mean"}}, "pooling was auto and is mean", marks=pytest.mark.slow),
        pytest.param({"precision": "bf16-mixed"}, "precision was 32-true and is bf16-mixed", marks=pytest.mark.slow),
        pytest.param(
            {"transforms": {"good": lambda batch: (2 * batch[0], batch[1])}},
            "transform was None",
            marks=pytest.mark.slow,
        ),
        ({"n": 1400}, "samples was 1500 and is 1400"),
    ],
)
def test_a_changed_option_is_detected(candidates, tmp_path, change, warning):
    rank(candidates, tmp_path)
    options = {"n": 1500, **change}
    n = options.pop("n")
    with starts_anew("good", warning):
        resumed = rank(candidates, tmp_path, n, **options)
    fresh = rank_backbones(candidates, target_loader(n), **{**QUIET, **options})
    assert summary(resumed) == summary(fresh)


def test_a_changed_model_is_detected(candidates, tmp_path):
    rank(candidates, tmp_path)
    with torch.no_grad():
        candidates["good"].scale.mul_(1.01)
    with starts_anew("good", "its features of the first samples changed"):
        rank(candidates, tmp_path)


def test_changed_inputs_of_the_same_labels_are_detected(candidates, tmp_path):
    rank(candidates, tmp_path)
    x, y = target_set(1500).tensors
    loader = DataLoader(TensorDataset(x + 0.1 * torch.randn_like(x), y), 50)
    with starts_anew("good", "its features of the first samples changed"):
        rank_backbones(candidates, loader, resume_from=tmp_path, **QUIET)


def test_a_changed_callable_of_the_same_name_is_detected(tmp_path):
    def transform(factor):
        return lambda batch: (batch[0] * torch.linspace(1, factor, WIDTH), batch[1])

    rank({"a": nn.Identity()}, tmp_path, transforms={"a": transform(1)})
    with starts_anew("a", "its features of the first samples changed"):
        rank({"a": nn.Identity()}, tmp_path, transforms={"a": transform(2)})


def two_labels(batch_size=50, target="fine", n=1500, relabelled=False):
    """Return options for a data set of two tasks, whose labels only its batches show."""
    x, y = target_set(n).tensors
    rows = [{"x": a, "coarse": b // 2, "fine": 3 - b if relabelled else b} for a, b in zip(x, y, strict=True)]
    return {"dataloader": DataLoader(rows, batch_size), "target": target, "forward": lambda m, batch: m(batch["x"])}


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"target": "coarse"}, "target was fine and is coarse"),
        ({"relabelled": True}, "the labels of the first samples changed"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"new": Columns(0, 9)}])
def test_changed_labels_are_detected(tmp_path, change, warning, more):
    first = {"good": Columns(0, 8), "bad": Columns(16, 24)}
    rank_backbones(first, resume_from=tmp_path, **two_labels(), **QUIET)
    with starts_anew("good", warning):
        resumed = rank_backbones({**first, **more}, resume_from=tmp_path, **two_labels(**change), **QUIET)
    fresh = rank_backbones({**first, **more}, **two_labels(**change), **QUIET)
    assert summary(resumed) == summary(fresh)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(50, 50), (50, 7), (512, 512), (300, 20)])
def test_a_ranking_can_be_resumed_with_another_batch_size(candidates, tmp_path, sizes):
    first = rank_backbones(candidates, resume_from=tmp_path, race=False, **two_labels(sizes[0]), **QUIET)
    Counted.seen = 0
    again = rank_backbones(
        {**candidates, "new": Columns(0, 9)}, resume_from=tmp_path, race=False, **two_labels(sizes[1]), **QUIET
    )
    assert Counted.seen <= 3 * 16
    assert again.scores["good"] == first.scores["good"]


def test_rounds_of_another_size_are_detected(candidates, tmp_path):
    loader = DataLoader(target_set(1500), 50)
    rank_backbones(candidates, loader, resume_from=tmp_path, num_classes=4, accelerator="cpu", progress=False)
    with starts_anew("good", "num_outputs was 4 and is 100"):
        rank_backbones(
            {**candidates, "new": Columns(0, 9)},
            loader,
            resume_from=tmp_path,
            num_classes=100,
            accelerator="cpu",
            progress=False,
        )


def test_a_stream_in_batches_of_another_size_is_detected(candidates, tmp_path):
    stream = Stream(target_set())
    rank_backbones(candidates, DataLoader(stream, 50), resume_from=tmp_path, **QUIET)
    with starts_anew("good", "batch was 50 and is 60"):
        rank_backbones(candidates, DataLoader(stream, 60), resume_from=tmp_path, **QUIET)


def test_a_folder_that_cannot_be_written_to_is_warned_of(candidates, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="could not be written .*No space left on device"):
        assert rank(candidates, tmp_path).best in ("good", "also")


def test_a_damaged_file_is_detected(candidates, tmp_path):
    first = rank(candidates, tmp_path)
    for path in tmp_path.glob("good*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with starts_anew("good", r"good.*\.pt cannot be read"):
        assert summary(rank(candidates, tmp_path)) == summary(first)


def test_a_file_without_accuracy_is_not_used(candidates, tmp_path):
    """As in the folder of an earlier version."""
    first = rank(candidates, tmp_path)
    for path in tmp_path.glob("good*.pt"):
        saved = torch.load(path, weights_only=True)
        for score in [score for one in saved["progress"]["rounds"] for score in one["scores"].values()]:
            del score["accuracy"], score["accuracy_replicates"]
        torch.save(saved, path)
    Counted.seen = 0
    with starts_anew("good", r"good.*\.pt cannot be read .*accuracy"):
        assert summary(rank(candidates, tmp_path)) == summary(first)
    assert Counted.seen == 1500 + 3 * 16


def test_results_can_be_ranked_by_another_value_without_new_features(candidates, tmp_path):
    rank(candidates, tmp_path, race=False)
    Counted.seen = 0
    again = rank(candidates, tmp_path, race=False, rank_by="accuracy")
    assert Counted.seen == 3 * 16
    options = {**QUIET, "race": False, "rank_by": "accuracy"}
    assert summary(again) == summary(rank_backbones(candidates, target_loader(1500), **options))


def test_candidates_can_be_added(candidates, tmp_path):
    rank(good_to_bad(), tmp_path, race=False)
    Counted.seen = 0
    ranking = rank({**good_to_bad(), "new": Counted(0, 9)}, tmp_path, race=False)
    assert {row.name for row in ranking.rows} == {"good", "fair", "bad", "new"}
    assert Counted.seen == 1500 + 16


def test_a_failed_candidate_is_tried_again(tmp_path):
    failing = {"a": Columns(0, 8), "b": lambda: 1 / 0}
    assert rank(failing, tmp_path).rows[1].ended == "failed"
    ranking = rank({"a": Columns(0, 8), "b": lambda: Columns(0, 8)}, tmp_path)
    assert ranking.tied == ["a", "b"] or ranking.tied == ["b", "a"]
