"""A Samza job's properties: read as Java reads them, and what they mean."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.job_config import Credentials, Job, JobConfig, load, parse_properties, read_job
from samza_kinesis_io.positions import StartingPosition
from samza_kinesis_io.task import SystemStream

#: As a user of Samza's own Kinesis connector writes it (samza-hello-samza's kinesis-hello-samza.properties, grown).
JOB = """
# Application
app.name=delays
job.factory.class=org.apache.samza.job.yarn.YarnJobFactory
yarn.package.path=file://${basedir}/target/${project.artifactId}-${pom.version}-dist.tar.gz
job.systemstreampartition.grouper.factory=org.apache.samza.container.grouper.stream.AllSspToSingleTaskGrouperFactory

systems.kinesis.samza.factory=org.apache.samza.system.kinesis.KinesisSystemFactory
systems.kinesis.aws.region=eu-west-1
systems.kinesis.aws.clientConfig.SocketTimeout=20000
systems.kinesis.aws.kcl.InitialPositionInStream=TRIM_HORIZON
systems.kinesis.aws.kcl.MaxRecords=500
systems.kinesis.aws.kcl.IdleTimeBetweenReadsInMillis=250
systems.kinesis.streams.flights.aws.kcl.TableName=delays-table
systems.kinesis.streams.flights.aws.accessKey=AKIAEXAMPLE
sensitive.systems.kinesis.streams.flights.aws.secretKey=very/secret

serializers.registry.json.class=org.apache.samza.serializers.JsonSerdeFactory
serializers.registry.text.class=org.apache.samza.serializers.StringSerdeFactory
systems.kinesis.streams.flights.samza.msg.serde=json
systems.kinesis.samza.key.serde=text

task.class=jobs.delays.DelayTask
task.inputs=kinesis.flights,kinesis.air.ports
task.window.ms=10000
task.commit.ms=-1
stores.seen.factory=org.apache.samza.storage.kv.RocksDbKeyValueStorageEngineFactory
stores.seen.key.serde=text
stores.seen.msg.serde=json
stores.seen.changelog=kafka.seen-changelog
"""


def job(*more: str, text: str = JOB) -> Job:
    return read_job(JobConfig(parse_properties(text + "\n" + "\n".join(more))))


class TestProperties:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a=b", {"a": "b"}),
            ("a = b ", {"a": "b "}),
            ("  a:b", {"a": "b"}),
            ("a b c", {"a": "b c"}),
            ("a", {"a": ""}),
            ("a==b", {"a": "=b"}),
            ("a\t:\t b", {"a": "b"}),
            ("# comment\n! comment\n\n   # indented\na=b", {"a": "b"}),
            ("a=b\na=c", {"a": "c"}),
            ("a=1,\\\n   2,\\\n   3", {"a": "1,2,3"}),
            ("a=b\\\\\nc=d", {"a": "b\\", "c": "d"}),
            ("a=x\\\n#no comment", {"a": "x#no comment"}),
            ("a\\ b\\=c\\:=d", {"a b=c:": "d"}),
            ("a=\\t\\n\\u00fc\\q\\\\", {"a": "\t\nüq\\"}),
            ("a=b\rc=d\r\ne=f", {"a": "b", "c": "d", "e": "f"}),
            ("a=b\\", {"a": "b"}),
            ("a=\\\n", {"a": ""}),
            ("=v", {"": "v"}),
            ("a=${x} # kept", {"a": "${x} # kept"}),
        ],
    )
    def test_a_line_is_read_as_java_reads_it(self, text: str, expected: dict[str, str]) -> None:
        assert parse_properties(text) == expected

    def test_half_a_unicode_escape_is_an_error(self) -> None:
        with pytest.raises(ConfigurationError, match="four hexadecimal digits"):
            parse_properties("a=\\u00g0")

    @given(st.dictionaries(st.text(), st.text()))
    def test_what_java_would_store_is_loaded(self, values: dict[str, str]) -> None:
        def escape(text: str) -> str:
            return "".join("\\" + c if c in " \\=:#!\t\f" else {"\n": "\\n", "\r": "\\r"}.get(c, c) for c in text)

        stored = "\n".join(f"{escape(k)}={escape(v)}" for k, v in values.items())
        # "\\\t" is an escaped tab, not a "t".
        assert parse_properties(stored) == values

    def test_a_later_file_wins_and_an_override_wins_over_all(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("a=1\nb=1\nc=1")
        (tmp_path / "b").write_bytes("b=2\nc=ü".encode("iso-8859-1"))
        got = load([str(tmp_path / "a"), f"file://{tmp_path}/b"], ["a=3=4"])
        assert dict(got) == {"a": "3=4", "b": "2", "c": "ü"}

    def test_the_environment_counts_if_the_job_names_its_rewriter(self, tmp_path: Path) -> None:
        rewriter = "job.config.rewriter.env.class=org.apache.samza.config.EnvironmentConfigRewriter"
        (tmp_path / "a").write_text("task.window.ms=1")
        environment = {"SAMZA_TASK_WINDOW_MS": "2", "PATH": "x"}
        assert load([str(tmp_path / "a")], [], environment)["task.window.ms"] == "1"
        got = load([str(tmp_path / "a")], ["job.config.rewriters=env", rewriter], environment)
        assert got["task.window.ms"] == "2"

    def test_what_cannot_be_read_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match="--config-path /no/such can't be read"):
            load(["/no/such"])
        with pytest.raises(ConfigurationError, match="--config must be KEY=VALUE, got 'x'"):
            load([], ["x"])

    def test_secrets_are_masked_and_do_not_travel(self) -> None:
        config = JobConfig(
            {"sensitive.x": "s1", "systems.k.aws.secretKey": "s2", "systems.k.streams.t.aws.accessKey": "s3", "a": "b"}
        )
        assert "s1" not in repr(config)
        assert "s2" not in repr(config)
        assert "s3" not in repr(config)
        assert "'a': 'b'" in repr(config)
        assert config.public() == {"a": "b"}
        assert config["sensitive.x"] == "s1"


class TestJob:
    def test_a_job_of_samzas_own_connector_is_read_as_it_stands(self) -> None:
        got = job()
        assert (got.name, got.job_id, got.task_class) == ("delays", "1", "jobs.delays.DelayTask")
        assert [str(i.system_stream) for i in got.inputs] == ["kinesis.flights", "kinesis.air.ports"]
        assert {i.starting_position for i in got.inputs} == {StartingPosition.trim_horizon()}
        system = got.systems["kinesis"]
        assert (system.client.region, system.client.read_timeout_seconds) == ("eu-west-1", 20.0)
        assert (system.max_records_per_get, system.poll_interval_seconds) == (500, 0.25)
        assert (got.options.window_seconds, got.options.commit_seconds) == (10.0, None)
        assert got.credentials == Credentials("AKIAEXAMPLE", "very/secret")

    def test_checkpoints_are_in_the_kcls_table_as_in_samza(self) -> None:
        got = job()
        assert got.checkpoint_kind == "dynamodb"
        assert [i.lease_table for i in got.inputs] == ["delays-table", "delays-1-air.ports"]

    def test_a_streams_serde_goes_before_its_systems(self) -> None:
        got = job("systems.kinesis.default.stream.samza.msg.serde=string")
        flights, ports = SystemStream("kinesis", "flights"), SystemStream("kinesis", "air.ports")
        message, other, key = got.serdes.message(flights), got.serdes.message(ports), got.serdes.key(ports)
        assert message is not None
        assert message.from_bytes(b"[1]") == [1]
        assert other is not None
        assert other.from_bytes(b"[1]") == "[1]"
        assert key is not None
        assert key.from_bytes(b"AA") == "AA"

    def test_without_a_serde_bytes_stay_bytes(self) -> None:
        assert job().serdes.message(SystemStream("kinesis", "air.ports")) is None

    def test_an_envelope_that_names_an_unregistered_serde_is_told_the_key(self) -> None:
        with pytest.raises(
            ConfigurationError, match=r"registered: json, text\); add serializers\.registry\.avro\.class"
        ):
            job().serdes.named("avro")

    def test_a_store_has_its_serdes_and_its_changelog(self) -> None:
        (store,) = job("stores.seen.max.bytes=1000").stores
        assert (store.name, store.changelog, store.max_bytes) == ("seen", True, 1000)

    def test_a_changelog_without_a_place_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"stores\.seen\.changelog needs a place"):
            job("task.checkpoint.factory=none")

    @pytest.mark.parametrize(
        ("factory", "kind"),
        [("file", "file"), ("memory", "memory"),
         ("org.apache.samza.checkpoint.file.FileSystemCheckpointManagerFactory", "file"),
         ("org.apache.samza.checkpoint.kafka.KafkaCheckpointManagerFactory", "dynamodb")],
    )  # fmt: skip
    def test_the_checkpoint_factory_is_ours_or_samzas(self, factory: str, kind: str) -> None:
        assert job(f"task.checkpoint.factory={factory}", "task.checkpoint.path=/tmp/x").checkpoint_kind == kind

    def test_files_need_a_path(self) -> None:
        with pytest.raises(ConfigurationError, match=r"task\.checkpoint\.path is missing"):
            job("task.checkpoint.factory=file")


class TestStreams:
    def test_a_stream_id_has_a_physical_name_and_properties_that_go_first(self) -> None:
        got = job(
            "task.inputs=kinesis.in",
            "streams.in.samza.system=kinesis",
            "streams.in.samza.physical.name=flights-2026",
            "streams.in.samza.reset.offset=true",
            "systems.kinesis.streams.in.samza.reset.offset=false",
        )
        (stream,) = got.inputs
        assert (str(stream.system_stream), stream.reset_offset) == ("kinesis.flights-2026", True)

    @pytest.mark.parametrize(
        ("lines", "start"),
        [
            ((), StartingPosition.latest()),
            (("systems.kinesis.samza.offset.default=oldest",), StartingPosition.trim_horizon()),
            (("systems.kinesis.default.stream.samza.offset.default=upcoming",
              "systems.kinesis.samza.offset.default=oldest"),
             StartingPosition.latest()),
            (("systems.kinesis.streams.flights.samza.offset.default=oldest",), StartingPosition.trim_horizon()),
            (("systems.kinesis.samza.offset.default=oldest", "systems.kinesis.aws.kcl.InitialPositionInStream=LATEST"),
             StartingPosition.latest()),
            (("systems.kinesis.streams.flights.aws.kcl.InitialPositionInStream=AT_TIMESTAMP",
              "systems.kinesis.aws.kcl.TimestampAtInitialPositionInStream=2026-01-31T12:00:00Z"),
             StartingPosition.at_timestamp(Timestamp.from_rfc3339("2026-01-31T12:00:00Z"))),
        ],
    )  # fmt: skip
    def test_where_a_stream_starts(self, lines: tuple[str, ...], start: StartingPosition) -> None:
        text = "\n".join(line for line in JOB.splitlines() if "InitialPosition" not in line)
        assert job(*lines, text=text).inputs[0].starting_position == start


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("task.broadcast.inputs=kinesis.x#0", "give it as a side input"),
            ("systems.kinesis.streams.flights.samza.bootstrap=true", "no end up to which to read it first"),
            ("job.elasticity.factor=2", "split the shard"),
            ("task.async.commit=true", "a commit is the end of a bundle"),
            ("systems.kinesis.aws.clientConfig.ProxyHost=p", "set HTTPS_PROXY"),
            ("systems.kinesis.samza.offset.default=newest\nsystems.kinesis.aws.kcl.InitialPositionInStream=",
             "must be oldest or upcoming, got 'newest'; Kinesis can't be asked"),
            ("systems.kinesis.aws.kcl.InitialPositionInStream=HORIZON", "must be LATEST, TRIM_HORIZON or AT_TIMESTAMP"),
            ("systems.kinesis.aws.kcl.InitialPositionInStream=AT_TIMESTAMP", "must be a time with its zone"),
            ("task.inputs=flights", "task.inputs must be written system.stream"),
            ("task.inputs=", "task.inputs is missing"),
            ("task.class=", "task.class is missing"),
            ("app.name=", "job.name is missing"),
            ("task.inputs=kafka.flights", r"systems.kafka.samza.factory is missing"),
            ("task.inputs=kafka.x\nsystems.kafka.samza.factory=org.apache.samza.system.kafka.KafkaSystemFactory",
             "only Kinesis can be read"),
            ("task.window.ms=soon", "task.window.ms must be a whole number, got 'soon'"),
            ("task.drop.producer.errors=yes", "must be true or false, got 'yes'"),
            ("systems.kinesis.samza.msg.serde=jsn", "samza.msg.serde is 'jsn'"),
            ("serializers.registry.s.class=org.apache.samza.serializers.SerializableSerdeFactory", "Java's own object"),
            ("task.checkpoint.factory=redis", "must be dynamodb, file, memory or none"),
            ("job.systemstreampartition.grouper.factory=my.Grouper", "each shard has a task of its own"),
            ("systems.kinesis.aws.accessKey=AKIA", "secretKey is missing: keys come in pairs"),
            ("systems.kinesis.streams.flights.aws.region=us-east-1", "aws.region differs between streams"),
            ("systems.kinesis.aws.kcl.TableName=t\nsystems.kinesis.streams.flights.aws.kcl.TableName=",
             "kinesis.flights and kinesis.air.ports would share the lease table t"),
            ("job.config.rewriters=x", "only EnvironmentConfigRewriter"),
        ],
    )  # fmt: skip
    def test_what_cannot_mean_what_it_says_is_refused_with_the_reason(
        self, line: str, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "job.properties").write_text(f"{JOB}\n{line}\n")
        with pytest.raises(ConfigurationError, match=message):
            read_job(load([str(tmp_path / "job.properties")]))

    def test_unknown_keys_are_warned_about_once_and_samzas_other_keys_are_mentioned(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            job("task.windw.ms=5", "my.own=1", "task.opts=-Xmx1g")
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "my.own, task.windw.ms" in warnings[0]
        notices = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
        assert len(notices) == 1
        assert "job.factory.class, task.opts, yarn.package.path" in notices[0]

    def test_credentials_are_never_shown(self) -> None:
        got = job()
        assert "very/secret" not in repr(got)
        assert "AKIAEXAMPLE" not in repr(got)

    def test_documented_names_and_those_the_code_reads_are_both_read(self) -> None:
        assert job("task.callback.ms=50").options.callback_timeout_seconds == 0.05
        assert job("task.callback.timeout.ms=60").options.callback_timeout_seconds == 0.06
        text = JOB.replace("sensitive.systems", "systems")
        assert job(text=text).credentials == Credentials("AKIAEXAMPLE", "very/secret")
