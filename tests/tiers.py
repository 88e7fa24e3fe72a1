"""The tiers of the tests that need more than Python, and what happens where their tools are missing.

A tier whose tool cannot be had is skipped, with the reason and the way to get it. With REQUIRE_ALL_TIERS=1, as in CI,
it fails instead: a tier that nobody runs checks nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Where `make prism` and `make emulators` put what they fetch.
CACHE = ROOT / ".cache"
KINESIS_LOCAL = CACHE / "emulators/node_modules/kinesis-local/main.js"
DYNALITE = CACHE / "emulators/node_modules/dynalite/cli.js"


def require_tool(name: str | Path, why: str, how_to_get: str, *, may_be_missing: bool = False) -> str:
    """Return the path of a program (looked for in .cache/bin, then on PATH) or of a file given by its path.

    Where it is missing the test is skipped; with REQUIRE_ALL_TIERS=1 it fails, unless the tier `may_be_missing`
    (Flink and Spark, whose runners are not installed by this repository).
    """
    if isinstance(name, Path):
        if name.exists():
            return str(name)
    else:
        found = shutil.which(name, path=str(CACHE / "bin")) or shutil.which(name)
        if found is not None:
            return found
    missing(str(name), why, how_to_get, may_be_missing=may_be_missing)


def missing(name: str, why: str, how_to_get: str, *, may_be_missing: bool = False) -> NoReturn:
    """Skip or fail this test for want of something that is not a file, such as a running daemon."""
    reason = f"{name} is missing; {why}. To get it: {how_to_get}"
    if os.environ.get("REQUIRE_ALL_TIERS") == "1" and not may_be_missing:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def prism() -> str:
    """Return the path of the Prism binary, for `--prism_location`."""
    return require_tool("prism", "PrismRunner runs on it", "make prism (needs Go)")


def node() -> str:
    return require_tool("node", "the emulators run on it", "https://nodejs.org, or apt-get install nodejs npm")


def kinesis_local() -> list[str]:
    """Return the command line of kinesis-local; its ports and limits are environment variables."""
    return [node(), require_tool(KINESIS_LOCAL, "it is one of the emulators of the contract suite", "make emulators")]


def dynalite() -> list[str]:
    """Return the command line of dynalite, to which `--host` and `--port` are added."""
    return [node(), require_tool(DYNALITE, "checkpoints in DynamoDB are tested on it", "make emulators")]
