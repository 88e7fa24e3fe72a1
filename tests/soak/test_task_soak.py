"""Jobs that are killed with kill -9 and started anew, on the DirectRunner, while shards split and merge."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samza_kinesis_io.testing import LocalKinesis

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

JOB = """
job.name=soak
systems.kinesis.samza.factory=kinesis
systems.kinesis.aws.region=us-east-1
systems.kinesis.aws.kcl.KinesisEndpoint={endpoint}
systems.kinesis.aws.kcl.InitialPositionInStream=TRIM_HORIZON
systems.kinesis.aws.kcl.IdleTimeBetweenReadsInMillis=200
systems.kinesis.streams.in.samza.msg.serde=json
systems.kinesis.streams.out.samza.msg.serde=json
task.class=echo_job.Echo
task.inputs=kinesis.in
task.commit.ms=300
task.checkpoint.factory=file
task.checkpoint.path={path}
"""

TASK = """
from samza_kinesis_io.task import OutgoingMessageEnvelope, StreamTask, SystemStream

class Echo(StreamTask):
    def process(self, envelope, collector, coordinator):
        collector.send(OutgoingMessageEnvelope(SystemStream("kinesis", "out"), envelope.message, key=envelope.key))
"""


def reshard(kinesis: LocalKinesis, rng: random.Random) -> None:
    shards = sorted((s for s in kinesis.fake.shards("in") if not s.is_closed), key=lambda s: s.hash_key_range.start)
    if len(shards) > 1 and rng.random() < 0.5:
        i = rng.randrange(len(shards) - 1)
        kinesis.fake.merge("in", shards[i].shard_id, shards[i + 1].shard_id)
    else:
        kinesis.fake.split("in", rng.choice(shards).shard_id)


def test_a_job_killed_20_times_loses_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    with LocalKinesis() as kinesis:
        kinesis.fake.create_stream("in", shards=2)
        kinesis.fake.create_stream("out", shards=1)
        (tmp_path / "echo_job.py").write_text(TASK)
        (tmp_path / "job.properties").write_text(JOB.format(endpoint=kinesis.endpoint_url, path=tmp_path / "ck"))
        count = 0
        command = [
            sys.executable, "-m", "samza_kinesis_io.pipelines.run_task",
            f"--config-path={tmp_path / 'job.properties'}", "--runner=DirectRunner",
        ]  # fmt: skip

        def written() -> set[int]:
            return {json.loads(r.data) for r in kinesis.fake.records("out")}

        repeated_rounds = 0
        for _ in range(20):
            before = len(kinesis.fake.records("out"))
            root = Path(__file__).parents[2]
            with (tmp_path / "log").open("ab") as log:
                process = subprocess.Popen(command, cwd=root, env=_environment(tmp_path, root), stdout=log, stderr=log)
            try:
                # Kill it at a random moment after it has begun to write.
                deadline = time.monotonic() + 60
                extra = rng.random() * 1.5
                began: float | None = None
                while began is None or time.monotonic() < began + extra:
                    assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                    for _ in range(rng.randrange(4)):
                        kinesis.fake.put("in", str(count).encode(), partition_key=f"key-{count % 13}")
                        count += 1
                    if rng.random() < 0.02:
                        reshard(kinesis, rng)
                    time.sleep(0.02)
                    if began is None and len(kinesis.fake.records("out")) > before:
                        began = time.monotonic()
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
            repeated_rounds += len(kinesis.fake.records("out")) > len(written())
        subprocess.run([*command, "--stop-at=now"], cwd=root, env=_environment(tmp_path, root), check=True, timeout=120)
        assert set(range(count)) - written() == set()
        assert repeated_rounds, "kill -9 repeats something sooner or later; else this test kills too gently"


def _environment(path: Path, root: Path) -> dict[str, str]:
    import os

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "PYTHONPATH": f"{root}:{path}"}
    return {**os.environ, **keys}
