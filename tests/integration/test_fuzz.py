"""Ten thousand malformed calls: each is refused with one clear sentence that names an argument."""

import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from lightning_logme import LogME, LogMECallback, Probe
from lightning_logme.functional import evidence

CALLS = 10_000
K = 3

Arguments = dict[str, Any]
Malformation = Callable[[random.Random, Arguments], None]


def well_formed(rng: random.Random) -> Arguments:
    """Return valid arguments of the function."""
    n, d = rng.randint(4, 24), rng.randint(1, 12)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % K
    task = rng.choice(["binary", "multiclass", "multilabel", "regression"])
    features = torch.randn(n, d, generator=generator) + torch.randn(K, d, generator=generator)[labels]
    features = features.to(rng.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    target = {
        "binary": labels % 2,
        "multiclass": labels,
        "multilabel": torch.eye(K)[labels].to(rng.choice([torch.float32, torch.int64, torch.bool])),
        "regression": torch.randn(n, rng.randint(1, 3), generator=generator).double(),
    }[task]
    return {"features": features, "target": target, "task": task, "fit_intercept": rng.random() < 0.3}


def set_to(name: str, *values: Any) -> Malformation:
    def change(rng: random.Random, arguments: Arguments) -> None:
        arguments[name] = rng.choice(values)

    return change


def changed(name: str, *changes: Callable[[Any], Any]) -> Malformation:
    def change(rng: random.Random, arguments: Arguments) -> None:
        arguments[name] = rng.choice(changes)(arguments[name])

    return change


def spoilt(name: str, *numbers: float) -> Malformation:
    """Return a malformation that puts an invalid number into a tensor."""

    def change(rng: random.Random, arguments: Arguments) -> None:
        values = arguments[name].double().clone()
        values.view(-1)[rng.randrange(values.numel())] = rng.choice(numbers)
        arguments[name] = values

    return change


def wrong_labels(rng: random.Random, arguments: Arguments) -> None:
    labels = arguments["target"].clone()
    labels[rng.randrange(len(labels))] = rng.choice([-1, -100, -(2**40), 2**31, 2**62])
    arguments["target"] = labels


def twos(rng: random.Random, arguments: Arguments) -> None:
    target = arguments["target"].double()
    target[0, 0] = rng.choice([2, -1, 0.5])
    arguments["target"] = target


ANYWHERE: dict[str, list[Malformation]] = {
    "features": [
        set_to(
            "features", None, 3, "features", [[1.0, 2.0]], (), object(), {1: 2}, np.array([["a"]]), np.array([None])
        ),
        changed(
            "features",
            lambda x: x.long(),
            lambda x: x.bool(),
            lambda x: x.to(torch.complex64),
            lambda x: x[:, 0],
            lambda x: x[0, 0],
            lambda x: x[None, None],
            lambda x: x.to("meta"),
            lambda x: x.tolist(),
            lambda x: x.float().numpy().astype("longdouble"),
            lambda x: x.float().numpy().astype(object),
            lambda x: x.float().numpy().astype(str),
            lambda x: np.ma.masked_array(x.float().numpy(), mask=True),
            lambda x: torch.nested.nested_tensor([x, x]),
        ),
        spoilt("features", float("nan"), float("inf"), -float("inf")),
    ],
    "target": [
        set_to("target", None, 1, "target", [1, 0, 1], object(), np.array(["a"]), torch.tensor(1)),
        changed(
            "target",
            lambda y: y.to("meta"),
            lambda y: y.to(torch.complex64),
            lambda y: y.tolist(),
            lambda y: torch.cat([y, y]),
            lambda y: y[:-1],
            lambda y: y[:0],
            lambda y: y[None, None].expand(len(y), 2, *y.shape),
        ),
    ],
    "task": [set_to("task", None, 1, "", "ranking", "Multiclass", ["multiclass"], b"binary", torch.zeros(3))],
    "num_classes": [set_to("num_classes", 0, -1, 2.0, "3", True, [3], torch.tensor(3), float("nan"))],
    "ignore_index": [set_to("ignore_index", "a", 1.5, [1], True, torch.tensor(1), float("nan"))],
    "fit_intercept": [set_to("fit_intercept", None, 1, 0, "yes", [], torch.tensor(True))],
}
OF_TASK: dict[str, dict[str, list[Malformation]]] = {
    "binary": {
        "target": [wrong_labels, changed("target", lambda y: y.double(), lambda y: y[:, None], lambda y: y + 1)]
    },
    "multiclass": {
        "target": [wrong_labels, changed("target", lambda y: y.half(), lambda y: torch.eye(K)[y])],
        "num_classes": [set_to("num_classes", 1, 2)],
    },
    "multilabel": {
        "target": [twos, spoilt("target", float("nan"), 7.0), changed("target", lambda y: y[:, 0], lambda y: y[:, :0])],
        "num_classes": [set_to("num_classes", 1, 2, 4)],
    },
    "regression": {
        "target": [spoilt("target", float("nan"), float("inf")), changed("target", lambda y: y > 0)],
        "num_classes": [set_to("num_classes", 1, 3)],
        "ignore_index": [set_to("ignore_index", 0, -100)],
    },
}


def malform(rng: random.Random, arguments: Arguments) -> list[str]:
    """Spoil one or more arguments, and return their names."""
    task = arguments["task"]
    names = rng.sample(sorted(ANYWHERE), rng.choice([1, 1, 1, 2, 3]))
    for name in names:
        rng.choice(ANYWHERE[name] + OF_TASK[task].get(name, []))(rng, arguments)
    return names


def check_message(error: BaseException, names: list[str], context: object) -> None:
    message = str(error)
    assert any(name in message for name in names), (message, names, context)
    assert "\n" not in message, message
    assert message.endswith("."), message
    assert len(message) < 500, message


def refuses(call: Callable[[], Any], names: list[str], context: object) -> None:
    try:
        call()
    except (ValueError, TypeError) as error:
        check_message(error, names, context)
    else:
        raise AssertionError(f"accepted, although {names} are malformed: {context}")


def of_the_metric(arguments: Arguments) -> tuple[LogME, Arguments]:
    """Return the metric for a well-formed call, and the arguments of the metric."""
    task, target = arguments["task"], arguments["target"]
    columns = target.shape[1] if target.ndim == 2 else 1
    options: Arguments = {"task": task, "num_features": arguments["features"].shape[1]}
    options |= {"multiclass": {"num_classes": K}, "multilabel": {"num_labels": K}}.get(task, {"num_outputs": columns})
    options["fit_intercept"] = arguments["fit_intercept"]
    return LogME(**options), options


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_malformed_calls_of_function_and_metric_name_the_argument():
    rng, met = random.Random(0), Counter()
    for _ in range(CALLS):
        arguments = well_formed(rng)
        metric, options = of_the_metric(arguments)
        names = malform(rng, arguments)
        met.update(names)
        context = {name: getattr(value, "dtype", value) for name, value in arguments.items()}
        refuses(lambda arguments=arguments: evidence(**arguments), names, context)

        # A metric does not look for NaN and Inf in every batch. The score is NaN in the end.
        values = [arguments["features"], arguments["target"]]
        dense = [torch.is_tensor(value) and not value.is_meta and not value.is_nested for value in values]
        finite = not any(ok and not bool(torch.isfinite(v).all()) for v, ok in zip(values, dense, strict=True))
        if {"features", "target"} & set(names) and finite:
            refuses(lambda m=metric, a=arguments: m.update(a["features"], a["target"]), ["features", "target"], context)
            assert float(metric.count) == 0
            assert not metric.gram.any()
        for name in {"task", "fit_intercept", "ignore_index"} & set(names):
            refuses(lambda o={**options, name: arguments[name]}: LogME(**o), [name], context)
    assert min(met.values()) > CALLS / 10


def test_well_formed_calls_have_the_right_score():
    rng = random.Random(1)
    for _ in range(500):
        arguments = well_formed(rng)
        target = arguments["target"]
        columns = target if target.ndim == 2 else torch.eye(2 if arguments["task"] == "binary" else K)[target]
        features, columns = arguments["features"].double().numpy(), columns.double().numpy()
        if arguments["fit_intercept"]:
            features, columns = oracles.without_mean(features), oracles.without_mean(columns)
        expected = np.mean([oracles.by_singular_values(features, y) for y in columns.T])
        metric, _ = of_the_metric(arguments)
        for part, labels in zip(arguments["features"].split(7), target.split(7), strict=True):
            metric.update(part, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for score in (evidence(**arguments).score, metric.compute()):
                assert float(score) == pytest.approx(expected, rel=1e-6, abs=1e-6), arguments


WRONG: dict[str, list[Any]] = {
    "head": [3, [], [1], [None], "", b"fc", 1.5],
    "layers": ["fc", 3, [1, 2], [None], {"a": 1}.values()],
    "task": [None, "x", 3],
    "num_classes": [0, -3, 2.5, "4", True],
    "target": [1.5, True, [1], b"y", {"a": 1}],
    "pooling": ["max", None, 3, ["mean"], torch.zeros(2)],
    "name": ["", None, 3, ["logme"]],
    "fit_intercept": ["no", None, 1],
    "ignore_index": ["a", 1.5, True],
    "class_names": ["cats", 3, [1, 2]],
    "plots": ["no", None, 2],
    "curve": ["yes", 1],
    "validation": ["yes", 0],
    "layer_mean": ["yes", 1, True],  # True without layers
    "features": [3, "f", [len]],
    "probes": [[1], "news", 3, {"": [1]}, {1: [1]}, {"layer_mean": [1]}, {"dataloader_idx_0": [1]}],
    "probe_every": [0, -1, 1.5, "often", None, True],
}
WRONG_PROBES: dict[str, list[Any]] = {
    "task": [None, "x"],
    "num_classes": [0, "3", 1.5, True],
    "target": [1.5, [1], True],
    "forward": [3, "forward"],
    "limit_batches": [0, -1, 1.5, "all", True],
    "ignore_index": ["a", 0.5],
}


def test_malformed_options_of_callback_and_probes_name_the_argument():
    rng = random.Random(2)
    for _ in range(CALLS // 10):
        kind, wrong = rng.choice([(LogMECallback, WRONG), (lambda **options: Probe([], **options), WRONG_PROBES)])
        names = rng.sample(sorted(wrong), rng.choice([1, 1, 2]))
        options = {name: rng.choice(wrong[name]) for name in names}
        refuses(lambda kind=kind, options=options: kind(**options), names, options)
