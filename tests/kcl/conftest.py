"""The Kinesis Client Library, built once."""

from __future__ import annotations

import os
import subprocess

import pytest

from tiers import CACHE, ROOT, require_tool

WHY = "the KCL runs on it"


@pytest.fixture(scope="session")
def kcl_java() -> list[str]:
    """The command line of Java with the KCL and our classes beside it; a class's name and its arguments go behind."""
    java = require_tool("java", WHY, "apt-get install openjdk-17-jdk-headless, or https://adoptium.net")
    maven = require_tool("mvn", "the KCL and its dependencies come from Maven Central", "apt-get install maven")
    built = subprocess.run(
        [maven, "-q", "-B", "-f", str(ROOT / "tests/kcl/pom.xml"), "compile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    # LocalKinesis speaks JSON; the SDK would speak CBOR.
    return [java, "-Daws.cborEnabled=false", "-cp", f"{CACHE / 'kcl/classes'}{os.pathsep}{CACHE / 'kcl/lib'}/*"]
