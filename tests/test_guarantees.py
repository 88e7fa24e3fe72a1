"""What docs/guarantees*.md say is tested is tested."""

from __future__ import annotations

import re
from collections import defaultdict

from tiers import ROOT


def test_every_test_that_the_guarantees_name_exists() -> None:
    files: dict[str, str] = defaultdict(str)
    for path in (ROOT / "tests").rglob("test_*.py"):
        files[path.stem] += path.read_text()
    text = (ROOT / "docs/guarantees.md").read_text()
    named = re.findall(r"`(test_\w+)::(\w+)`", text)
    assert len(named) > 80
    missing = [f"{file}::{name}" for file, name in named if not re.search(rf"^\s*(def )?{name}\b", files[file], re.M)]
    assert not missing
    for file in re.findall(r"`(test_\w+)\.py`", text):
        assert file in files


def test_every_scenario_has_its_row() -> None:
    """Rows 1 to 33 and 43 to 56; fan-out's are one row."""
    text = (ROOT / "docs/guarantees.md").read_text()
    scenarios = text[text.index("## Scenarios") : text.index("## Features")]
    rows = {int(number) for number in re.findall(r"^\| (\d+) \|", scenarios, re.M)}
    assert rows == {*range(1, 34), *range(43, 57)}


def test_every_test_that_the_sinks_guarantees_name_exists() -> None:
    """They name a test, or the class of several, by its bare name."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+|Test\w+|Any\w+)`", (ROOT / "docs/guarantees_sink.md").read_text()))
    assert len(named) > 40
    assert not [name for name in named if not re.search(rf"\b(def|class) {name}\b", tests)]
