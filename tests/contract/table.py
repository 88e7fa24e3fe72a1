"""Run the contract and write what came of it into docs/testing.md:  python tests/contract/table.py

Needs every target (`make emulators`); a behaviour that fails stops it, and the page stays as it was.
"""

from __future__ import annotations

import ast
import datetime
import importlib.metadata
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs/testing.md"
FILES = ("test_streams_and_shards.py", "test_records.py")
BEGIN, END = "<!-- contract table: begin -->", "<!-- contract table: end -->"


class Outcomes:
    """A pytest plugin that remembers how each behaviour went on each target."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        found = re.search(r"::test_(\w+)\[([A-Za-z]+(?:-local)?)", report.nodeid)
        if found:
            reason = getattr(report, "wasxfail", None)
            self.seen[found[1]][found[2]].add(reason if reason is not None else report.outcome)


def main() -> int:
    outcomes = Outcomes()
    status = pytest.main(["-q", "-m", "", "--tb=short", *(str(HERE / f) for f in FILES)], plugins=[outcomes])
    if status != pytest.ExitCode.OK:
        return int(status)
    sys.path.insert(0, str(HERE.parent))
    from contract.targets import TARGETS

    from tiers import KINESIS_LOCAL

    versions = {
        "kinesis-local": json.loads((KINESIS_LOCAL.parent / "package.json").read_text())["version"],
        "moto": importlib.metadata.version("moto"),
    }
    heads = [f"{name} {versions[name]}" if name in versions else name for name in TARGETS]
    lines = [
        BEGIN,
        f"Made on {datetime.date.today()} by `python tests/contract/table.py`, "
        f"with botocore {importlib.metadata.version('botocore')}.",
        "",
        "| Behaviour | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for behaviour in _in_order():
        cells = [_cell(outcomes.seen[behaviour].get(name, set())) for name in TARGETS]
        lines.append(f"| {behaviour.replace('_', ' ')} | " + " | ".join(cells) + " |")
    kept = {n: sum(outcomes.seen[b].get(n) == {"passed"} for b in _in_order()) for n in TARGETS}
    lines += ["| **behaviours kept** | " + " | ".join(f"**{kept[n]}**" for n in TARGETS) + " |", END]
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + "\n".join(lines) + page[page.index(END) + len(END) :])
    return 0


def _in_order() -> list[str]:
    return [
        node.name.removeprefix("test_")
        for file in FILES
        for node in ast.parse((HERE / file).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def _cell(outcomes: set[str]) -> str:
    """Yes; how it differs; or nothing, where the target's time cannot be moved."""
    if not outcomes:
        return ""
    return "yes" if outcomes == {"passed"} else "; ".join(sorted(outcomes - {"passed"}))


if __name__ == "__main__":
    sys.exit(main())
