"""Pages that name tests name tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(\w+/[\w/]+\.py)::(\w+)`")                     # below tests/
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md"))
         if NAMED.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_is_named_exists(page):
    for file, name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, name)


def test_the_page_about_balance_names_tests():
    assert "balance" in {page.stem for page in PAGES}
