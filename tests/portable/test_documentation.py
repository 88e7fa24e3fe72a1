"""The table of docs/runners.md names tests; they must be there."""

from __future__ import annotations

import re

from tiers import ROOT

TESTS = ROOT / "tests"


def test_every_test_that_the_table_of_runners_names_exists() -> None:
    text = (ROOT / "docs/runners.md").read_text()
    named = set(re.findall(r"`(?:(\w+\.py)::)?(test_\w+)`", text))
    assert len(named) > 15
    portable = "".join(path.read_text() for path in (TESTS / "portable").glob("test_*.py"))
    for file, test in named:
        source = (TESTS / file).read_text() if file else portable
        assert f"def {test}(" in source, f"docs/runners.md names {test}, which is not in {file or 'tests/portable'}"
