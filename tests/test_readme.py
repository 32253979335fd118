"""The READMEs keep their limits, their code runs, and what they name exists."""

import ast
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from models import Classifier, ConvNet, images, loader
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[1]
README = "README.md"
# The least number of Python blocks, commands, links and pictures in each file: a pattern that finds nothing must fail.
FOUND = {
    README: (3, 11, 9, 2),
    "examples/README.md": (0, 15, 10, 6),
    "tests/README.md": (5, 11, 7, 0),
    "tests/benchmarks/README.md": (0, 17, 2, 0),
}
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FOUND if (ROOT / name).is_file()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
COMMAND = re.compile(r"`((?:python |pip |pytest|\.ci/)[^`]*)`")


def blocks(name, language):
    return [code for found, code in FENCE.findall(TEXTS[name]) if found == language]


def commands(name):
    """Return the commands of shell blocks and of inline code, one by one, without comments."""
    prose = FENCE.sub("", TEXTS[name])
    lines = [line for code in blocks(name, "bash") for line in code.splitlines()]
    lines += [" ".join(code.split()) for code in COMMAND.findall(prose)]
    return [shlex.split(one, comments=True) for line in lines for one in line.split("&&") if one.strip()]


def links(name):
    """Return the targets of links, without those of pictures."""
    return [target for mark, _, target in LINK.findall(FENCE.sub("", TEXTS[name])) if not mark]


def pictures(name):
    """Return the alternative text and the path of each picture."""
    return [(alternative, path) for mark, alternative, path in LINK.findall(TEXTS[name]) if mark]


def anchors(path):
    """Return the anchors that GitHub gives to the headings of a file."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def benchmarks():
    """Return the names that ``python -m tests.benchmarks --only`` takes."""
    tree = ast.parse((ROOT / "tests/benchmarks/__main__.py").read_text(encoding="utf-8"))
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "BENCHMARKS"]
    return {key.value for key in tables[0].keys}


def is_known(command):
    """Return whether a command names only files, extras, tests and benchmarks that exist."""
    match command:
        case ["python", "-m", "tests.benchmarks"]:
            return True
        case ["python", "-m", "tests.benchmarks", "--only", *names]:
            return bool(names) and set(names) - {"--processor-time"} <= benchmarks()
        case ["python", "-m", "lightning_logme", "rank" | "score_checkpoints", *_]:
            return True
        case ["python", script, *_]:
            return (ROOT / script).is_file()
        case ["pip", "install", "lightning-logme"]:
            return True  # see test_index_is_not_promised
        case ["pip", "install", "-e", what]:
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            extra = re.fullmatch(r"\.\[(\w+)\]", what)
            return what == "." or (extra is not None and f"\n{extra[1]} = [" in project)
        case ["pip", "install", "--no-deps", *packages]:
            return bool(packages) and all(re.fullmatch(r"[\w.-]+==[\w.]+", package) for package in packages)
        case ["tensorboard", "--logdir", _]:
            return True
        case ["pytest", *options]:
            return not options or options[0].startswith("-")
        case [script]:
            return script.startswith(".ci/") and (ROOT / script).is_file()
    return False


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that code in the READMEs uses without defining them, in a folder with two checkpoints."""
    monkeypatch.chdir(tmp_path)
    data = images()
    (tmp_path / "runs/checkpoints").mkdir(parents=True)
    for epoch in range(2):
        torch.save({"state_dict": Classifier(ConvNet()).state_dict()}, tmp_path / f"runs/checkpoints/{epoch}.ckpt")
    return {
        "model": Classifier(ConvNet()),
        "train_loader": loader(data),
        "val_loader": loader(data),
        "news_loader": loader(data),
        "mood_loader": loader(TensorDataset(data.tensors[0], torch.randn(len(data)))),
        "target_loader": loader(data),
        "small_model": ConvNet(),
        "make_large": ConvNet,
        "batches": [(torch.randn(40, 512), torch.arange(40) % 10) for _ in range(3)],
    }


def test_readmes_are_there():
    assert set(TEXTS) == set(FOUND)


@pytest.mark.parametrize("name", TEXTS)
def test_contents_are_found(name):
    counts = len(blocks(name, "python")), len(commands(name)), len(links(name)), len(pictures(name))
    assert all(count >= least for count, least in zip(counts, FOUND[name], strict=True)), counts


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_is_of_a_language_that_is_checked(name):
    """A block holds code that runs, commands that are checked, or plain text. Every fence is closed."""
    fences = [line for line in TEXTS[name].splitlines() if line.lstrip(" >").startswith("```")]
    languages = [language for language, _ in FENCE.findall(TEXTS[name])]
    assert len(fences) == 2 * len(languages)
    assert set(languages) <= {"python", "bash", "text", "bibtex"}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{name}, block {number}")
        for name in TEXTS
        for number, code in enumerate(blocks(name, "python"))
    ],
)
def test_python_blocks_run(code, names):
    exec(code, names)


@pytest.mark.parametrize("name", TEXTS)
def test_commands_name_what_exists(name):
    assert [" ".join(command) for command in commands(name) if not is_known(command)] == []


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_pictures_lead_somewhere(name):
    missing = []
    for target in [*links(name), *(path for _, path in pictures(name))]:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []
    assert all(alternative for alternative, _ in pictures(name))


def test_first_readme_is_short():
    lines = TEXTS[README].splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    assert len(TEXTS[README].split()) <= 1300


def test_first_readme_holds_the_two_commands():
    """.ci/run reads the second one."""
    first, second = "".join(blocks(README, "bash")).splitlines()
    assert first == "pip install -e '.[examples]' && python examples/quickstart.py"
    assert second == "pip install -e '.[test]' && pytest"


@pytest.mark.parametrize("name", TEXTS)
def test_index_is_not_promised(name):
    paragraphs = [text for text in TEXTS[name].split("\n\n") if re.search(r"pip install '?lightning-logme", text)]
    assert all("not on an index yet" in text for text in paragraphs)


@pytest.mark.parametrize("name", ["tests/README.md", "tests/benchmarks/README.md"])
def test_named_tests_exist(name):
    named = re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", TEXTS[name])
    assert named
    assert [f"{file}::{test}" for file, test in named if test not in functions(ROOT / "tests" / file)] == []


def test_every_promise_names_its_tests():
    section = TEXTS["tests/README.md"].split("## What is promised")[1].split("\n## ")[0]
    rows = [line for before, line in pairwise(section.splitlines()) if before.startswith("|") and line.startswith("| ")]
    assert len(rows) >= 43
    assert [row for row in rows if "::test_" not in row] == []
    assert section.count("::test_") >= 71
