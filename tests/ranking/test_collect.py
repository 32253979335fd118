"""Layers, their mean, and labels of tokens in rankings, compared with functional calls on features of a plain loop."""

import math

import pytest
import torch
from backbones import CLASSES, QUIET, Columns, Net, Stream, rank, target_loader, target_set, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import rank_backbones, score_checkpoints
from lightning_logme.functional import evidence, logme

OPTIONS = {**QUIET, "race": False}


class NotANumber(nn.Module):
    """Appends a column of NaN, which the next module drops."""

    def forward(self, x):
        return torch.cat([x, torch.full_like(x[:, :1], math.nan)], 1)


def expected(net, data, ignore_index=-100, **options):
    """Return the evidence of each row of a candidate."""
    x, y = (tensor.flatten(0, y.ndim - 1) for y in [data.tensors[1]] for tensor in data.tensors)
    kept = y != ignore_index
    return {row: evidence(features[kept], y[kept], **options) for row, features in net.features(x).items()}


def check(ranking, networks, data, **options):
    """Compare all rows of a ranking that saw all samples."""
    rows = {row.name: row for row in ranking.rows}
    expectations = {
        name + end: one for name, net in networks.items() for end, one in expected(net, data, **options).items()
    }
    assert set(rows) == set(ranking.evidence) == set(ranking.curves) == set(expectations)
    for name, one in expectations.items():
        assert rows[name].logme == pytest.approx(float(one.score), abs=1e-6), name
        assert rows[name].gain == pytest.approx(float(one.gain), abs=1e-6), name
        assert rows[name].num_samples == one.num_samples == ranking.curves[name][-1].num_samples
        assert ranking.curves[name][-1].logme == rows[name].logme
        torch.testing.assert_close(ranking.evidence[name].weight, one.weight, rtol=1e-4, atol=1e-6)
        assert ranking.head(name).in_features == rows[name].num_features == one.weight.shape[1]


class TestLayers:
    @pytest.mark.parametrize("width", [12, pytest.param(700, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("options", [{}, {"fit_intercept": True}])
    def test_each_row_has_the_evidence_of_its_layer(self, options, width):
        """Also with fewer samples than features, where rows are kept instead of moments."""
        nets = {"one": Net(width=width), "two": Net(0, 16, width, seed=1)}
        ranking = rank(nets, layers=["low", "high"], layer_mean=True, race=False, **options)
        check(ranking, nets, target_set(), **options)
        assert {row.name.removeprefix("one"): row.feature for row in ranking.rows if row.name.startswith("one")} == {
            "": "input of 'head'",
            "/low": "output of 'low'",
            "/high": "output of 'high'",
            "/layer_mean": "mean of layers",
        }
        assert [row.logme for row in ranking.rows] == sorted(ranking.scores.values(), reverse=True)
        assert all(row.stderr > 0 for row in ranking.rows)

    def test_normalize_applies_to_every_layer(self):
        x, y = target_set().tensors
        ranking = rank({"net": Net()}, layers=["low"], normalize=True, race=False)
        for row, features in Net().features(x).items():
            if f"net{row}" in ranking.scores:
                unit = nn.functional.normalize(features.double(), dim=1)
                assert ranking.scores[f"net{row}"] == pytest.approx(float(logme(unit, y)), abs=1e-6)
        assert len(ranking.scores) == 2

    def test_layers_can_be_patterns_and_differ_by_candidate(self):
        candidates = {"a": Net(), "b": Net(seed=1), "c": Net(seed=2)}
        ranking = rank(candidates, layers={"a": ["high.*", "low"], "b": ["high", "low"]}, layer_mean=True, race=False)
        assert {row.name for row in ranking.rows} == {
            *("a", "a/high.0", "a/high.1", "a/low", "a/layer_mean"),
            *("b", "b/high", "b/low", "b/layer_mean"),
            "c",
        }
        assert ranking.scores["a/high.1"] == pytest.approx(
            float(logme(Net().features(target_set().tensors[0])["/high"], target_set().tensors[1])), abs=1e-6
        )
        with pytest.raises(ValueError, match="layers names 'd', but the only candidates are 'a', 'b', 'c'"):
            rank(candidates, layers={"d": ["low"]})
        with pytest.raises(ValueError, match=r"layers must be a sequence of names, got the string 'low'"):
            rank(candidates, layers="low")
        with pytest.raises(ValueError, match="layer_mean is the mean of layers: name them"):
            rank(candidates, layer_mean=True)
        with pytest.raises(ValueError, match="layer_mean must be True or False, got 'yes'"):
            rank(candidates, layers=["low"], layer_mean="yes")

    def test_a_generator_of_layers_serves_all_candidates(self):
        ranking = rank({"a": Net(), "b": Net(seed=1)}, layers=(name for name in ["low", "high"]))
        assert {row.name for row in ranking.rows} == {"a", "a/low", "a/high", "b", "b/low", "b/high"}

    def test_a_candidate_with_the_name_of_a_layers_row_is_an_error(self):
        candidates = {"net": Net(), "net/low": Net(seed=1)}
        with pytest.raises(ValueError, match="candidates: 'net/low' could be the row of a layer of 'net'; rename"):
            rank(candidates, layers=["low"])
        assert set(rank(candidates, layers={"net/low": ["low"]}).scores) == {"net", "net/low", "net/low/low"}

    def test_pooling_can_differ_by_layer(self):
        class Maps(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc = nn.Conv1d(2, 6, 3), nn.Linear(6, 3)

            def forward(self, x):
                return self.fc(self.conv(x.unflatten(1, (2, -1))).relu().mean(2))

        net, (x, y) = Maps(), target_set().tensors
        with torch.no_grad():
            maps = net.conv(x.unflatten(1, (2, -1)))
        ranking = rank({"net": net}, layers=["conv"], race=False)
        assert ranking.scores["net/conv"] == pytest.approx(float(logme(maps.mean(2), y)), abs=1e-6)
        pooling = {"net": {"conv": lambda maps: maps.amax(2)}}
        ranking = rank({"net": net}, layers=["conv"], pooling=pooling, race=False)
        assert ranking.scores["net/conv"] == pytest.approx(float(logme(maps.amax(2), y)), abs=1e-6)
        assert ranking.scores["net"] == pytest.approx(float(logme(maps.relu().mean(2), y)), abs=1e-6)

    def test_a_candidate_stays_in_the_race_while_one_of_its_rows_does(self):
        class Hidden(nn.Module):
            """Its output is as bad as that of the bad candidate, and one of its layers is the best."""

            def __init__(self):
                super().__init__()
                self.inner, self.outer = Columns(0, 8), Columns(16, 24)

            def forward(self, x):
                self.inner(x)
                return self.outer(x)

        candidates = {"hidden": Hidden(), "bad": Columns(16, 24), "good": Columns(0, 8)}
        ranking = rank(candidates, target_loader(2000), layers={"hidden": ["inner"]})
        rows = {row.name: row for row in ranking.rows}
        assert rows["hidden"].ended == rows["hidden/inner"].ended == "finished"
        assert rows["hidden"].num_samples == rows["hidden/inner"].num_samples == 2000
        assert (rows["bad"].ended, rows["bad"].num_samples) == ("dropped", 256)
        assert rows["bad"].logme == ranking.curves["hidden"][0].logme
        assert set(ranking.tied) == {"hidden/inner", "good"}
        without = rank({**candidates, "also": Columns(0, 8)}, target_loader(2000))
        assert {row.name: row.ended for row in without.rows}["hidden"] == "dropped"

    def test_a_dropped_candidate_has_the_message_of_its_best_row(self):
        candidates = {
            "bad": nn.Sequential(Columns(16, 24), Columns(4, 8)),
            "good": Columns(0, 8),
            "also": Columns(0, 8),
        }
        ranking = rank(candidates, target_loader(2000), layers={"bad": ["0"]})
        best, worst = (row for row in ranking.rows if row.ended == "dropped")
        assert {best.name, worst.name} == {"bad", "bad/0"}
        assert best.message == worst.message
        one = rank({**candidates, "bad": Columns(16, 24)}, target_loader(2000))
        assert best.message == one.rows[-1].message
        assert [name for name in ranking.evidence if name.startswith("bad")] == [best.name, worst.name]

    def test_layers_of_one_candidate_can_be_tied(self):
        net = nn.Sequential(Columns(0, 8), Columns(0, 8), Columns(4, 8))
        ranking = rank({"net": net}, target_loader(2000), layers=["0", "1"])
        assert set(ranking.tied) == {"net/0", "net/1"}
        assert ranking.scores["net/0"] == ranking.scores["net/1"] > ranking.scores["net"]
        assert ranking.head().in_features == 8

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (["lo"], "no attribute 'lo'|has no module 'lo'|'lo'"),
            (["nothing.*"], r"layers: no module of Net matches 'nothing.\*'"),
            (["unused"], "layer 'unused' was not called for this batch"),
            (["twice"], "layer 'twice' was called 2 times for one batch"),
            (["ragged"], r"output of 'ragged': features have length 1\d, but length \d+ in earlier batches; pool them"),
        ],
    )
    def test_a_layer_that_fails_fails_its_candidate(self, layers, message):
        class Ragged(nn.Module):
            calls = 0

            def forward(self, x):
                Ragged.calls += 1
                return x[:, : 8 + Ragged.calls]

        class Odd(Net):
            def __init__(self):
                super().__init__()
                self.unused, self.twice = nn.Identity(), nn.Identity()
                self.ragged = Ragged()

            def forward(self, x):
                self.ragged(x)
                return super().forward(self.twice(self.twice(x)))

        Odd.__name__ = "Net"
        ranking = rank({"odd": Odd(), "net": Net()}, layers={"odd": layers, "net": ["low"]})
        *others, odd = ranking.rows
        assert (odd.name, odd.ended) == ("odd", "failed")
        assert pytest.raises(AssertionError, match=message).matches(AssertionError(odd.message)), odd.message
        assert {row.name for row in others} == {"net", "net/low"}

    def test_a_layer_that_fails_later_keeps_the_rounds_before(self):
        seen = 0

        def pool(features):
            nonlocal seen
            seen += len(features)
            if seen > 300:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return features

        ranking = rank(
            {"later": Net(), "good": Columns(0, 8)},
            target_loader(2000),
            layers={"later": ["high", "low"]},
            pooling={"later": {"low": pool}},
        )
        rows = {row.name: row for row in ranking.rows if row.name.startswith("later")}
        assert set(rows) == {"later", "later/high", "later/low"}
        for name, row in rows.items():
            assert (row.ended, row.num_samples) == ("failed", 256)
            assert row.message == "output of 'low': OutOfMemoryError: CUDA out of memory"
            assert row.logme == ranking.curves[name][-1].logme == float(ranking.evidence[name].score)
            assert ranking.evidence[name].num_samples == 256

    @pytest.mark.filterwarnings("ignore:LogME is NaN. the features contain NaN or Inf")
    @pytest.mark.parametrize("rank_by", ["logme", "accuracy"])
    def test_a_row_of_nan_does_not_keep_its_candidate_in_the_race(self, rank_by):
        candidates = {"bad": nn.Sequential(NotANumber(), Columns(16, 24)), "good": Columns(0, 8)}
        ranking = rank(candidates, target_loader(2000), layers={"bad": ["0"]}, rank_by=rank_by)
        assert [(row.name, row.ended, math.isnan(row.logme)) for row in ranking.rows] == [
            ("good", "finished", False),
            ("bad", "dropped", False),
            ("bad/0", "dropped", True),
        ]
        assert [math.isnan(row.accuracy) for row in ranking.rows] == [False, False, True]

    def test_ctrl_c_keeps_complete_rounds(self):
        class Stops(Net):
            seen = 0

            def forward(self, x):
                Stops.seen += len(x)
                if Stops.seen > 300:
                    raise KeyboardInterrupt
                return super().forward(x)

        with pytest.warns(UserWarning, match="the ranking was interrupted"):
            ranking = rank({"net": Net(), "stops": Stops()}, target_loader(2000), layers=["low"])
        rows = {row.name: (row.num_samples, row.ended) for row in ranking.rows}
        assert rows == {
            **dict.fromkeys(("net", "net/low"), (512, "interrupted")),
            **dict.fromkeys(("stops", "stops/low"), (256, "interrupted")),
        }
        assert ranking.scores["stops/low"] == ranking.curves["net/low"][0].logme

    def test_layers_of_checkpoints_are_scored(self, tmp_path):
        nets = {str(tmp_path / f"{seed}.pt"): Net(seed=seed) for seed in range(2)}
        for path, net in nets.items():
            torch.save(net.state_dict(), path)
        options = {**OPTIONS, "layers": ["low", "high"], "layer_mean": True}
        ranking = score_checkpoints(Net(seed=5), nets, target_loader(), **options)
        check(ranking, nets, target_set())
        data = tokens()
        check(score_checkpoints(Net(seed=5), nets, DataLoader(data, 30), **options), nets, data)


class TestTokens:
    @pytest.mark.parametrize("width", [12, pytest.param(500, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("kind", ["drawn", "stream"])
    def test_each_token_that_is_not_ignored_is_a_sample(self, kind, width):
        """Also with fewer tokens than features, where rows are kept instead of moments."""
        data = tokens(length=5 if width == 12 else 2)
        nets = {"one": Net(width=width), "two": Net(0, 16, width, seed=1)}
        loader = DataLoader(data if kind == "drawn" else Stream(data), 32)
        ranking = rank(nets, loader, layers=["low", "high"], layer_mean=True, race=False)
        check(ranking, nets, data)
        number = int((data.tensors[1] != -100).sum())
        assert {row.num_samples for row in ranking.rows} == {number}
        assert number != data.tensors[1].numel()

    @pytest.mark.parametrize("kind", ["drawn", "stream"])
    def test_a_race_over_tokens_ends_with_the_sequences(self, kind):
        data = tokens(1000)
        loader = DataLoader(data if kind == "drawn" else Stream(data), 64)
        ranking = rank({"good": Net(0, 8), "also": Net(0, 8), "bad": Net(16, 24)}, loader)
        rows = {row.name: row for row in ranking.rows}
        number = int((data.tensors[1] != -100).sum())
        assert rows["good"].num_samples == rows["also"].num_samples == number
        assert rows["good"].ended == rows["also"].ended == "finished"
        assert rows["bad"].ended == "dropped"
        assert 256 * 5 * 0.6 < rows["bad"].num_samples < 256 * 5 * 0.8
        assert len(ranking.curves["good"]) == 3  # 256, 512, 1000 sequences
        assert f"standard errors behind at {rows['bad'].num_samples} samples" in rows["bad"].message

    def test_the_progress_bar_counts_sequences(self, monkeypatch):
        totals = []
        bar = type("Bar", (), {"__enter__": lambda self: self, "__exit__": lambda *_: None})

        def shown(total, **_):
            totals.append([total, 0])
            bar.update = staticmethod(lambda number: totals[-1].__setitem__(1, totals[-1][1] + number))
            return bar()

        monkeypatch.setattr("lightning_logme.ranking.report.tqdm", shown)
        rank({"net": Net()}, DataLoader(tokens(400), 32), race=False)
        assert totals == [[256, 256], [400, 144]]

    @pytest.mark.parametrize("ignore_index", [-100, 3, None])
    def test_labels_equal_to_ignore_index_do_not_count(self, ignore_index):
        data = target_set()
        if ignore_index == -100:
            data = TensorDataset(data.tensors[0], torch.where(torch.arange(600) % 5 == 0, -100, data.tensors[1]))
        net = Net()
        ranking = rank({"net": net}, DataLoader(data, 50), ignore_index=ignore_index, layers=["low"], race=False)
        one = expected(net, data, 99 if ignore_index is None else ignore_index, num_classes=CLASSES)
        for end in ("", "/low"):
            assert ranking.scores[f"net{end}"] == pytest.approx(float(one[end].score), abs=1e-6)
        assert {row.num_samples for row in ranking.rows} == {one[""].num_samples}

    def test_negative_labels_are_an_error_without_ignore_index(self):
        with pytest.raises(ValueError, match="target holds labels from -100 to 3"):
            rank({"net": Net()}, DataLoader(tokens(), 32), ignore_index=None)
        with pytest.raises(ValueError, match="ignore_index must be an integer or None, got 'no'"):
            rank({"net": Net()}, ignore_index="no")

    def test_classes_are_counted_without_ignored_labels(self):
        data, net = tokens(), Net()
        ranking = rank({"net": net}, DataLoader(data, 32), num_classes=None, race=False)
        assert ranking.scores["net"] == pytest.approx(float(expected(net, data)[""].score), abs=1e-6)

    def test_a_first_round_of_ignored_labels_does_not_end_the_race(self):
        x, y = tokens(600, ignored=0.0).tensors
        data = TensorDataset(x, torch.where(torch.arange(600)[:, None] < 300, -100, y))
        candidates = {"good": Net(0, 8), "also": Net(0, 8)}
        with pytest.warns(UserWarning, match="LogME is NaN"):
            ranking = rank(candidates, DataLoader(Stream(data), 64))
        one = expected(Net(0, 8), data)[""]
        assert ranking.scores["good"] == pytest.approx(float(one.score), abs=1e-6)
        assert [point.num_samples for point in ranking.curves["good"]] == [0, (512 - 300) * 5, 300 * 5]
        assert math.isnan(ranking.curves["good"][0].logme)

    def test_only_ignored_labels_give_nan(self):
        x, y = tokens().tensors
        with pytest.warns(UserWarning, match="LogME is NaN"):
            ranking = rank({"a": Net(), "b": Net()}, DataLoader(TensorDataset(x, torch.full_like(y, -100)), 32))
        assert len(ranking.rows) == 2
        for row in ranking.rows:
            assert math.isnan(row.logme)
            assert math.isnan(row.stderr)
            assert (row.num_samples, row.message) == (
                0,
                "there is no evidence in these samples; a warning gives the cause",
            )

    def test_features_of_sequences_with_labels_of_tokens_are_a_failed_row(self):
        data = DataLoader(tokens(), 32)
        ranking = rank({"pooled": Net(), "tokens": Net()}, data, forward={"pooled": lambda net, batch: batch[0].sum(1)})
        row = ranking.rows[-1]
        assert (row.name, row.ended) == ("pooled", "failed")
        assert "got (32, 5); give one label per sample" in row.message


def test_layers_of_a_factory_are_scored_in_every_round():
    made = []

    def factory():
        made.append(Net())
        return made[-1]

    ranking = rank_backbones({"made": factory, "also": Net()}, target_loader(1500), layers=["low", "high"], **QUIET)
    assert {row.ended for row in ranking.rows} == {"finished"}
    assert len(made) == 3
    assert ranking.scores["made/low"] == ranking.scores["also/low"]
