"""The examples' pictures and README. No example is run here."""

import re
from argparse import ArgumentParser
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", [[], ["--update-images"]])
def test_picture_in_the_repository_changes_only_on_request(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    import _script

    monkeypatch.setattr(_script, "IMAGES", tmp_path / "images")
    parser = ArgumentParser()
    _script.add_output_options(parser, "quickstart")
    with matplotlib.rc_context():
        _script.save_picture(_script.make_figure(height=1), "quickstart", parser.parse_args(flags))
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert pictures == {"runs/quickstart/quickstart.png"} | ({"images/quickstart.png"} if flags else set())


def test_only_one_script_saves_pictures():
    scripts = [path for path in EXAMPLES.glob("*.py") if re.search(r"savefig|images\"", path.read_text("utf-8"))]
    assert [path.name for path in scripts] == ["_script.py"]


def test_readme_names_each_example_with_its_command():
    scripts = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("_")}
    assert len(scripts) == 12
    assert set(re.findall(r"^python examples/(\w+\.py)", README, flags=re.MULTILINE)) == scripts
    assert set(re.findall(r"^\| \[(\w+\.py)\]", README, flags=re.MULTILINE)) == scripts


def test_readme_links_exist():
    pictures = re.findall(r"!\[[^]]+\]\((images/\w+\.png)\)", README)
    assert len(pictures) == 9
    assert all((EXAMPLES / path).is_file() for path in pictures)
    headings = re.findall(r"^#+ (.+)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(links) == 12
    assert set(links) <= anchors
