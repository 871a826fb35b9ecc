"""The READMEs keep their promises: links lead somewhere, named functions and tests exist, the course stays short."""

import re
from pathlib import Path

import pytest

from data import pictures

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("data/*/README.md"))]
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def links(file):
    """(text, target) of every link that leads to a file."""
    found = LINK.findall(file.read_text())
    return [(text, ROOT / file.parent / target) for text, target in found if "://" not in target]


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere_and_named_functions_exist(file):
    for text, link in links(file):
        target, _, anchor = str(link).partition("#")
        target = Path(target)
        assert target.exists(), f"{file}: {target}"
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings]
        name = re.fullmatch(r"`(\w+)`", text)
        if name and target.suffix == ".py":
            assert re.search(rf"^ *(def|class) {name[1]}\b", target.read_text(), re.MULTILINE), f"{target}: {name[1]}"


def test_the_course_is_short_and_shows_every_picture():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500
    assert len(pictures.DRAWN) == 9 and all(f"](assets/{name}.png)" in text for name in pictures.DRAWN)
    lessons = re.split(r"^### \d\. ", text.split("## Train it yourself")[0], flags=re.MULTILINE)[1:]
    assert len(lessons) == 7
    for lesson in lessons:
        assert lesson.splitlines()[0].endswith("?"), "a lesson answers a question"
        assert "$$" in lesson or "](assets/" in lesson or lesson is lessons[0]
        assert ".py)" in lesson and "](tests/test_" in lesson and "Exercise:" in lesson


def test_the_files_named_exist():
    """Modules and folders that a README names in backquotes."""
    for file in READMES:
        for name in re.findall(r"`((?:data|tests|assets)/[\w./-]+\.(?:py|png|md|json|mp4))`", file.read_text()):
            assert (ROOT / name).exists(), f"{file}: {name}"


def test_every_module_of_data_is_in_its_map():
    text = (ROOT / "data" / "README.md").read_text()
    modules = sorted(f.name for f in (ROOT / "data").glob("*.py") if f.name != "__init__.py")
    listed = re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)
    assert sorted(listed) == modules
