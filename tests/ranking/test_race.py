"""Rankings in two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import QUIET, Columns, Net, Stream, target_set, tokens
from torch import nn
from torch.utils.data import DataLoader

from lightning_logme import rank_backbones

pytestmark = pytest.mark.slow


def fails_in_one_process(features):
    """Pool the output of a layer, or fail in process 1."""
    if os.environ.get("LOCAL_RANK") == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return features


class FailsInOneProcess(Columns):
    def forward(self, x):
        if os.environ.get("LOCAL_RANK") == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def summary(ranking):
    names = ("name", "logme", "stderr", "accuracy", "accuracy_stderr", "num_samples", "ended", "message")
    return {
        "rows": [[getattr(row, name) for name in names] for row in ranking.rows],
        "curves": ranking.curves,
        "weight": {name: evidence.weight.tolist() for name, evidence in ranking.evidence.items()},
    }


def cases(folder):
    """Return the candidates, the loader and the options of each case by name."""
    good = {"good": Columns(0, 8), "also": Columns(0, 8), "random": lambda: nn.Linear(24, 300), "bad": Columns(16, 24)}
    data = DataLoader(target_set(1100), batch_size=30)
    nets = {"good": Net(0, 8), "also": lambda: Net(0, 8), "wide": Net(width=1200), "bad": Net(16, 24)}
    layers = {"layers": ["low", "high"], "layer_mean": True}
    few_layers = {"good": ["high", "low"], "bad": ["low", "high"]}
    return {
        "map-style": (good, data, {}),
        "by accuracy, of a subset": (good, DataLoader(target_set(2500), 100), {"rank_by": "accuracy"}),
        "stream": (good, DataLoader(Stream(target_set(700)), 30), {}),
        "fewer batches than processes": ({"good": good["good"]}, DataLoader(target_set(40), 64), {}),
        "failure in one": ({**good, "fails": FailsInOneProcess(0, 8)}, data, {}),
        "failure of a layer in one": (
            {"good": Net(0, 8), "fails": Net()},
            data,
            {"layers": ["low"], "pooling": {"fails": {"low": fails_in_one_process}}},
        ),
        "layers": (nets, data, {**layers, "layers": few_layers}),
        "tokens": (nets, DataLoader(tokens(), 30), {**layers, "layers": few_layers}),
        "stream of tokens": ({"good": nets["good"], "also": nets["also"]}, DataLoader(Stream(tokens()), 30), layers),
        "few tokens": ({"good": nets["good"]}, DataLoader(tokens(40), 64), layers),
        "first time": (nets, data, {"resume_from": folder, "layers": ["low"]}),
        "resumed": (nets, data, {"resume_from": folder, "layers": ["low"]}),
    }


def run(folder, **options):
    return {
        name: summary(rank_backbones(candidates, loader, **{**QUIET, **more, **options}))
        for name, (candidates, loader, more) in cases(folder).items()
    }


@pytest.fixture(scope="session")
def one_and_two(tmp_path_factory):
    """The results of one process, and those of two processes that Fabric launches from a user's script."""
    folder = tmp_path_factory.mktemp("ranking")
    script = folder / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import json, os, torch\n"
        "torch.set_num_threads(1)\n"
        "from test_race import run\n"
        f"results = run({str(folder / 'moments')!r}, devices=2, strategy='ddp')\n"
        f"json.dump(results, open({str(folder)!r} + '/' + os.environ.get('LOCAL_RANK', '0') + '.json', 'w'))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script)], check=True, timeout=240, env=environment)
    two = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return json.loads(json.dumps(run(folder / "alone"))), two


@pytest.mark.parametrize(
    "case",
    [
        "map-style",
        "by accuracy, of a subset",
        "stream",
        "fewer batches than processes",
        "layers",
        "tokens",
        "stream of tokens",
        "few tokens",
        "first time",
        "resumed",
    ],
)
def test_two_processes_rank_as_one_does(one_and_two, case):
    one, two = one_and_two
    for rank in range(2):
        mine, expected = two[rank][case], one[case]
        assert [row[0] for row in mine["rows"]] == [row[0] for row in expected["rows"]]
        for row, expected_row in zip(mine["rows"], expected["rows"], strict=True):
            assert row[1:6] == pytest.approx(expected_row[1:6], rel=1e-9)
            assert row[6:] == expected_row[6:]
        assert mine["curves"].keys() == expected["curves"].keys() == mine["weight"].keys()
        for name, curve in expected["curves"].items():
            for point, expected_point in zip(mine["curves"][name], curve, strict=True):
                assert point == pytest.approx(expected_point, rel=1e-9)
        assert mine["weight"].keys() == expected["weight"].keys()
        for name, weight in expected["weight"].items():
            torch.testing.assert_close(torch.tensor(mine["weight"][name]), torch.tensor(weight))


def test_a_resumed_ranking_equals_the_first(one_and_two):
    one, two = one_and_two
    for results in (one, *two):
        assert results["resumed"] == results["first time"]


def test_a_failure_in_one_process_is_a_failed_row_in_all(one_and_two):
    _, two = one_and_two
    assert two[0]["failure in one"]["rows"] == two[1]["failure in one"]["rows"]
    *others, fails = two[0]["failure in one"]["rows"]
    assert fails[0] == "fails"
    assert fails[6:] == ["failed", "OutOfMemoryError: CUDA out of memory (process 1)"]
    assert {"good", "also"} <= {row[0] for row in others}
    assert others[0][6] == "finished"
    good, *rows = two[0]["failure of a layer in one"]["rows"]
    assert rows[-1][6:] == ["failed", "output of 'low': OutOfMemoryError: CUDA out of memory (process 1)"]
    assert good[6] == "finished"
    assert two[1]["failure of a layer in one"]["rows"] == [good, *rows]


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_ranking_in_forked_or_spawned_processes_returns_the_result(tmp_path, strategy):
    """As in a notebook. In a new process, because a fork would inherit the threads of this one."""
    script = tmp_path / "script.py"
    script.write_text(
        "from backbones import QUIET, Columns, target_loader\n"
        "from lightning_logme import rank_backbones\n"
        "if __name__ == '__main__':\n"
        "    candidates = {'good': Columns(0, 8), 'bad': Columns(16, 24)}\n"
        f"    ranking = rank_backbones(candidates, target_loader(), devices=2, strategy={strategy!r}, **QUIET)\n"
        "    print(ranking.best, ranking.head().in_features, ranking.rows[0].num_samples)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.stdout.splitlines()[-1:] == ["good 8 256"], done.stderr
