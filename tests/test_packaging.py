"""What a user installs: the wheel, and the source distribution it can be built from."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import samza_kinesis_io
from tiers import ROOT

BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, into: Path) -> Path:
    """Run setuptools' build hook, as pip does, without fetching anything."""
    into.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(into)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files git knows, so that a build neither sees nor leaves anything in the working tree."""
    to = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("needs the git checkout to build from")
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.exists():
            target.write_bytes(source.read_bytes())
    return to


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheels_only_top_level_name_is_the_package(wheel: Path) -> None:
    """`transforms` and `pipelines` as top-level modules would break users who have folders of these names."""
    tops = {n.split("/")[0] for n in names(wheel) if ".dist-info/" not in n}
    assert tops == {"samza_kinesis_io"}


def test_the_wheel_holds_every_module_the_checkout_holds(wheel: Path, checkout: Path) -> None:
    package = checkout / "samza_kinesis_io"
    ours = [*package.glob("*.py"), *package.glob("testing/*.py")]
    expected = {str(f.relative_to(checkout)) for f in ours}
    for folder in ("transforms", "pipelines"):
        expected |= {f"samza_kinesis_io/{folder}/{f.name}" for f in (checkout / folder).glob("*.py")}
    assert expected <= names(wheel)


def test_the_wheel_is_typed_and_holds_the_demos_flights(wheel: Path) -> None:
    assert {"samza_kinesis_io/py.typed", "samza_kinesis_io/pipelines/flights-sample.avro"} <= names(wheel)


def test_the_wheel_carries_its_license(wheel: Path) -> None:
    assert any(n.endswith("/LICENSE") for n in names(wheel))


def test_a_wheel_built_from_the_source_distribution_is_the_same(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    """The source distribution has no symlinks to rely on."""
    sdist = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    assert names(again) == names(wheel)


@pytest.mark.parametrize("folder", ["transforms", "pipelines"])
def test_the_checkout_is_importable_under_the_installed_names(folder: str) -> None:
    link = ROOT / "samza_kinesis_io" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


def test_public_names_are_sorted_and_exist() -> None:
    assert samza_kinesis_io.__all__ == sorted(samza_kinesis_io.__all__)
    for name in samza_kinesis_io.__all__:
        assert getattr(samza_kinesis_io, name) is not None
