"""The main job end to end, small: on an embedded Kinesis, through a split and a merge, to a verdict."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from samza_kinesis_io.pipelines import demo
from samza_kinesis_io.transforms.flight_delays import hourly_delays, read_flights
from tiers import prism

SAMPLE = Path(demo.__file__).with_name("flights-sample.avro")


@pytest.fixture
def flights(tmp_path: Path) -> Path:
    """The first 500 of the sample, as CSV."""
    path = tmp_path / "flights.csv"
    fields = ("scheduled_departure", "carrier", "flight", "origin", "destination")
    numbers = ("departure_delay_minutes", "arrival_delay_minutes")
    with path.open("w") as out:
        print(*fields, *numbers, sep=",", file=out)
        for flight in itertools.islice(read_flights(SAMPLE), 500):
            row = [getattr(flight, f) for f in fields + numbers]
            row = ["" if v is None else v.isoformat() if isinstance(v, datetime.datetime) else v for v in row]
            print(*row, sep=",", file=out)
    return path


def test_every_flight_is_counted_once_though_shards_split_and_merge(
    flights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = demo.main([f"--flights={flights}", "--load-seconds=2", "--margin-seconds=1"])
    told = " ".join(capsys.readouterr().out.split())  # the console breaks lines
    assert status == 0, told
    assert "Every flight was counted exactly once." in told
    # 4 at first, 2 by the split, 1 by the merge.
    assert "the stream had 7 shards" in told
    assert "split shardId-000000000000" in told


@pytest.mark.portable
def test_the_demo_comes_to_the_same_verdict_on_prism(flights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = demo.main(
        [f"--flights={flights}", "--load-seconds=4", "--runner=PrismRunner", f"--prism_location={prism()}"]
    )
    told = capsys.readouterr().out
    assert status == 0, told


def test_a_flight_that_is_missing_fails_the_demo(
    flights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are those of the first 499 flights, whose last departure was lost on the way."""
    monkeypatch.setattr(demo, "run_pipeline", lambda *_: None)
    some = list(read_flights(flights))
    monkeypatch.setattr(demo, "read_back", lambda *_: hourly_delays(some[:-1]))
    assert demo.main([f"--flights={flights}", "--load-seconds=0.1"]) == 1
    told = capsys.readouterr().out
    assert "1 differences from the file" in told
    assert f"{some[-1].carrier} 2013-01-01" in told


def test_a_load_that_ends_after_the_stop_is_no_verdict(flights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([f"--flights={flights}", "--load-seconds=0.5", "--margin-seconds=-0.5"]) == 1
    assert "after the read's stop" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing.csv", "flights.parquet"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([f"--flights={tmp_path / name}"]) == 1
    told = capsys.readouterr().out.replace("\n", "")
    assert name in told
    assert "--flights" in told


def test_the_direct_runner_is_refused_since_it_may_run_the_job_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--runner=DirectRunner"])
    assert "name FnApiRunner or PrismRunner" in capsys.readouterr().err


def test_the_table_has_a_bar_for_each_carrier() -> None:
    rows = hourly_delays(read_flights(SAMPLE))
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(demo.carriers_table(rows))
    lines = [line for line in console.export_text().splitlines() if "█" in line]
    assert len(lines) == len({row.carrier for row in rows})
