"""The documents: files that they name exist, and no table says the same twice."""

from __future__ import annotations

import fnmatch
import re
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "ops" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXAMPLES = frozenset({"msgpack.py", "my_program.py"})
"""Files of a user or of a model, which no document can find here."""
NAMED = re.compile(r"`([\w./*-]+\.(?:py|proto|md|toml|txt))`")
LINKED = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_files_that_a_document_names_exist(page: Path) -> None:
    """A path is from the root or from ``cluster/``; a bare name follows the path of another file of its folder."""
    files = {path.name for folder in ("cluster", "tests", "ops", "protos") for path in (ROOT / folder).rglob("*.*")}
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        if "/" in name:
            assert any(any(place.glob(name)) for place in (ROOT, ROOT / "cluster")), name
        else:
            assert fnmatch.filter(files, name) or (ROOT / name).exists() or name in EXAMPLES, name


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_of_a_document_lead_somewhere(page: Path) -> None:
    for place, heading in LINKED.findall(page.read_text(encoding="utf-8")):
        target = page.parent / place if place else page
        assert target.exists(), place
        if heading:
            lines = target.read_text(encoding="utf-8").splitlines()
            anchors = [re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()) for line in lines if line[:1] == "#"]
            assert heading in [anchor.replace(" ", "-") for anchor in anchors], heading


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_no_table_of_a_document_has_two_rows_of_one_name(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    for is_table, rows in groupby(lines, lambda line: line.startswith("|")):
        cells = [[cell.strip() for cell in row.split("|")[1:]] for row in rows] if is_table else []
        names = [next(cell for cell in row if not cell.isdecimal()) for row in cells]
        assert not {name for name in names if name and names.count(name) > 1}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_no_section_of_a_document_makes_one_point_twice(page: Path) -> None:
    """A merge can bring back the old wording of a list beside the new one."""
    for section in re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        points = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
        assert not {point for point in points if points.count(point) > 1}
