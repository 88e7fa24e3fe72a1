"""A Samza job's `.properties` file: read as Java reads it, and what it says, as values.

`parse_properties` and `load` make a mapping of texts; `read_job` makes a `Job` of it, warns about keys that mean
nothing here, and refuses those that would silently mean something else. docs/samza.md goes through them key by key.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.positions import StartingPosition
from samza_kinesis_io.serdes import Serde, serde
from samza_kinesis_io.stores import MAX_STORE_BYTES
from samza_kinesis_io.task import SystemStream, TaskOptions

_LOG = logging.getLogger(__name__)

# --- Reading properties ---------------------------------------------------------------------------------------------

_ESCAPES: Final = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_BLANK: Final = " \t\f"


def parse_properties(text: str) -> dict[str, str]:
    """Return the keys and values of a `.properties` text, by the rules of `java.util.Properties.load`.

    Raises:
        ConfigurationError: a \\uXXXX without four hexadecimal digits.
    """
    properties: dict[str, str] = {}
    for line in _logical_lines(text):
        end = 0
        while end < len(line) and line[end] not in "=:" + _BLANK:
            end += 2 if line[end] == "\\" else 1
        value = line[end:].lstrip(_BLANK)
        if value[:1] in ("=", ":"):
            value = value[1:].lstrip(_BLANK)
        properties[_unescape(line[:end])] = _unescape(value)
    return properties


def _logical_lines(text: str) -> Iterator[str]:
    """Yield the lines that hold a key: without comments, continued ones joined. Trailing blanks belong to the value."""
    begun: str | None = None
    for natural in re.split("\r\n|\n|\r", text):
        line = natural.lstrip(_BLANK)
        if begun is None:
            if not line or line[0] in "#!":
                continue
            begun = ""
        begun += line
        backslashes = len(begun) - len(begun.rstrip("\\"))
        if backslashes % 2 and line:
            begun = begun[:-1]
        else:
            yield begun
            begun = None
    if begun:
        yield begun


def _unescape(text: str) -> str:
    def replace(found: re.Match[str]) -> str:
        escaped = found.group(1)
        if escaped == "u":
            raise ConfigurationError(f"\\u in a properties file needs four hexadecimal digits, got {text!r}")
        return chr(int(escaped[1:], 16)) if len(escaped) > 1 else _ESCAPES.get(escaped, escaped)

    return re.sub(r"\\(u[0-9a-fA-F]{4}|.?)", replace, text, flags=re.DOTALL)


class JobConfig(Mapping[str, str]):
    """A job's keys and values. Printed, it masks the values of `sensitive.` keys and of secrets written without it."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> str:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        shown = {k: "********" if _is_secret(k) else v for k, v in sorted(self._values.items())}
        return f"JobConfig({shown!r})"

    def public(self) -> dict[str, str]:
        """Return the keys that may travel to workers and into a task's hands."""
        return {k: v for k, v in self._values.items() if not _is_secret(k)}


def _is_secret(key: str) -> bool:
    return key.startswith("sensitive.") or key.endswith((".aws.secretKey", ".aws.accessKey", ".aws.sessionToken"))


def load(
    paths: Iterable[str], overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> JobConfig:
    """Return the configuration of files, then `key=value` overrides; the later wins.

    Args:
        paths: Files, or `file://` addresses of files. UTF-8, or else ISO 8859-1 as Java has it.
        overrides: As `--config` takes them.
        environment: For the EnvironmentConfigRewriter, if the job names it: SAMZA_TASK_CLASS becomes task.class.

    Raises:
        ConfigurationError: a file can't be read, or an override has no "=".
    """
    values: dict[str, str] = {}
    for path in paths:
        try:
            data = Path(path.removeprefix("file://")).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"--config-path {path} can't be read: {error}") from error
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("iso-8859-1")
        values.update(parse_properties(text))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigurationError(f"--config must be KEY=VALUE, got {override!r}")
        values[key.strip()] = value
    for rewriter in _split(values.get("job.config.rewriters", "")):
        kind = values.get(f"job.config.rewriter.{rewriter}.class", "")
        if not kind.endswith("EnvironmentConfigRewriter"):
            raise ConfigurationError(
                f"job.config.rewriter.{rewriter}.class is {kind!r}; only EnvironmentConfigRewriter runs here"
            )
        for name, value in (environment or {}).items():
            if name.startswith("SAMZA_"):
                values[name.removeprefix("SAMZA_").lower().replace("_", ".")] = value
    return JobConfig(values)


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


# --- What a job is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InputStream:
    """A stream that a job reads.

    Attributes:
        system_stream: As tasks see it: the stream by its physical name.
        starting_position: Where shards without a checkpoint start.
        reset_offset: Checkpoints are not looked at.
        lease_table: The KCL's DynamoDB table, by the job's configuration or by the KCL's default.
    """

    system_stream: SystemStream
    starting_position: StartingPosition
    reset_offset: bool
    lease_table: str


@dataclass(frozen=True, slots=True)
class SystemConfig:
    """A Kinesis system.

    Attributes:
        client: How workers reach it.
        max_records_per_get, poll_interval_seconds: As configured for the KCL; None: the source's defaults.
        dynamodb_endpoint_url: Of its lease tables; None: AWS's.
    """

    name: str
    client: ClientConfig
    max_records_per_get: int | None = None
    poll_interval_seconds: float | None = None
    dynamodb_endpoint_url: str | None = None


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """A key-value store of each task."""

    name: str
    key_serde: Serde
    value_serde: Serde
    changelog: bool
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Serdes:
    """Which serde reads and writes what. A stream's goes before its system's; without one, bytes stay bytes."""

    by_name: Mapping[str, Serde]
    keys: Mapping[str, str]
    messages: Mapping[str, str]

    def key(self, stream: SystemStream) -> Serde | None:
        return self._find(self.keys, stream)

    def message(self, stream: SystemStream) -> Serde | None:
        return self._find(self.messages, stream)

    def named(self, name: str) -> Serde:
        """Return a registered serde, as an outgoing envelope names it.

        Raises:
            ConfigurationError: it is not registered.
        """
        try:
            return self.by_name[name]
        except KeyError:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise ConfigurationError(
                f"the serde {name!r} is not registered (registered: {known}); add serializers.registry.{name}.class"
            ) from None

    def _find(self, names: Mapping[str, str], stream: SystemStream) -> Serde | None:
        name = names.get(str(stream)) or names.get(stream.system)
        return self.by_name[name] if name else None


@dataclass(frozen=True, slots=True)
class Credentials:
    """Keys written into a job's configuration. For the environment of the process that starts it; never shown."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return "Credentials(********)"


@dataclass(frozen=True, slots=True)
class Job:
    """What a configuration says."""

    name: str
    job_id: str
    task_class: str
    inputs: tuple[InputStream, ...]
    systems: Mapping[str, SystemConfig]
    options: TaskOptions
    serdes: Serdes
    stores: tuple[StoreConfig, ...]
    checkpoint_kind: str
    """ "dynamodb", "file", "memory" or "none"."""
    checkpoint_path: str
    drop_deserialization_errors: bool
    drop_serialization_errors: bool
    drop_producer_errors: bool
    credentials: Credentials | None
    config: JobConfig


_FACTORIES: Final = ("org.apache.samza.system.kinesis.KinesisSystemFactory", "kinesis")
_GROUPERS: Final = (
    "GroupByPartitionFactory",
    "GroupBySystemStreamPartitionFactory",
    "AllSspToSingleTaskGrouperFactory",
)
_CHECKPOINT_KINDS: Final = {
    "none": "none",
    "memory": "memory",
    "file": "file",
    "dynamodb": "dynamodb",
    "FileSystemCheckpointManagerFactory": "file",
}

#: Keys that are refused: they would mean something else than they say.
_REFUSED: Final[Mapping[str, str]] = {
    r"task\.broadcast\.inputs": "a broadcast stream has no place in a task per shard; give it as a side input in Beam",
    r"systems\.[^.]+\.streams\..+\.samza\.bootstrap|streams\.[^.]+\.samza\.bootstrap": (
        "a Kinesis stream has no end up to which to read it first (Samza's connector refuses it too)"
    ),
    r"systems\.[^.]+\.aws\.clientConfig\.Proxy\w+": (
        "the proxy is a matter of each worker; set HTTPS_PROXY in the workers' environment"
    ),
    r"serializers\.registry\.[^.]+\.samza\.serialized\.instance": (
        "it holds a serialized Java object; name the serde by serializers.registry.NAME.class"
    ),
}

#: Keys of Samza that mean nothing here and do no harm; one notice for all of them.
_IGNORED: Final = re.compile(
    r"yarn\..*|cluster-manager\..*|job\.(factory\.class|coordinator\..*|container\..*|jmx\.enabled|security\..*|changelog\.system"
    r"|logged\.store\.base\.dir|non-logged\.store\.base\.dir|host-affinity\.enabled|autosizing\..*|standbytasks\..*|log4j\..*)"
    r"|processor\..*|task\.(opts|log4j\.system|java\.home|shutdown\.ms|poll\.interval\.ms|max\.idle\.ms|consumer\.batch\.size"
    r"|chooser\.class|commit\.(max\.delay|timeout)\.ms|checkpoint\.(replication\.factor|segment\.bytes|system|.*\.versions)"
    r"|name\.grouper\.factory|drop\.changelog\..*)"
    r"|metrics\.(reporters|reporter\..*)|(systems\.[^.]+\.(streams\..+\.)?|streams\.[^.]+\.)samza\.(priority|create|delete\.committed\.messages)"
    r"|systems\.[^.]+\.aws\.clientConfig\.MaxErrorRetry|app\.(runner\.class|mode|class)"
    r"|systems\.[^.]+\.(streams\..+\.)?aws\.kcl\.(FailoverTimeMillis|ShardSyncIntervalMillis|ParentShardPollIntervalMillis"
    r"|MaxLeasesForWorker|MaxLeasesToStealAtOneTime|InitialLeaseTable\w+|TaskBackoffTimeMillis|Metrics\w+|UserAgent"
    r"|CleanupLeasesUponShardCompletion|CallProcessRecordsEvenForEmptyRecordList|ValidateSequenceNumberBeforeCheckpointing"
    r"|RegionName|ShutdownGraceMillis|TimeoutInSeconds|MaxGetRecordsThreadPool|RetryGetRecordsInSeconds)"
    r"|stores\.[^.]+\.(rocksdb|container|object|write|changelog|side|backup|restore|delete)\..*"
)
#: Keys that `read_job` reads, or that belong to the user's own serdes and rewriters.
_READ: Final = re.compile(
    r"(job|app)\.(name|id)|job\.(default\.system|elasticity\.factor|config\.(rewriters|rewriter\..*)"
    r"|systemstreampartition\.grouper\.factory)"
    r"|task\.(class|inputs|window\.ms|commit\.ms|max\.concurrency|callback\.(timeout\.)?ms|async\.commit|ignored\.exceptions"
    r"|drop\.(deserialization|serialization|producer)\.errors|checkpoint\.(factory|path))"
    r"|systems\.[^.]+\.samza\.(factory|key\.serde|msg\.serde|offset\.default)"
    r"|systems\.[^.]+\.default\.stream\.samza\.(key\.serde|msg\.serde|offset\.default|reset\.offset)"
    r"|systems\.[^.]+\.streams\..+\.samza\.(key\.serde|msg\.serde|offset\.default|reset\.offset|physical\.name)"
    r"|streams\.[^.]+\.samza\.(system|physical\.name|key\.serde|msg\.serde|offset\.default|reset\.offset)"
    r"|systems\.[^.]+\.(streams\..+\.)?aws\.(region|endpoint|accessKey|secretKey)"
    r"|sensitive\.systems\.[^.]+\.(streams\..+\.)?aws\.(accessKey|secretKey)"
    r"|systems\.[^.]+\.aws\.clientConfig\.(ConnectionTimeout|SocketTimeout|MaxConnections)"
    r"|systems\.[^.]+\.(streams\..+\.)?aws\.kcl\.(TableName|ApplicationName|InitialPositionInStream|MaxRecords|DynamoDBEndpoint"
    r"|TimestampAtInitialPositionInStream|IdleTimeBetweenReadsInMillis|KinesisEndpoint)"
    r"|serializers\.registry\.[^.]+\..*"
    r"|stores\.[^.]+\.(factory|key\.serde|msg\.serde|changelog|max\.bytes)"
)


def read_job(config: Mapping[str, str]) -> Job:
    """Return the job that a configuration describes.

    Raises:
        ConfigurationError: a key is missing, has an impossible value, or is one that can't mean here what it says.
    """
    job_config = config if isinstance(config, JobConfig) else JobConfig(config)
    _check_keys(job_config)
    read = _Reader(job_config)
    name = read.text("app.name") or read.text("job.name")
    if not name:
        raise ConfigurationError("job.name is missing: checkpoints are kept under it; set job.name (or app.name)")
    job_id = read.text("app.id") or read.text("job.id") or "1"
    serdes = _serdes(read)
    inputs_text = read.required("task.inputs", "the streams the task reads, such as kinesis.flights")
    input_streams = [SystemStream.parse(i, "task.inputs") for i in _split(inputs_text)]
    if not input_streams:
        raise ConfigurationError(f"task.inputs names no stream, got {inputs_text!r}")
    systems = {s: _system(read, s, input_streams) for s in _kinesis_systems(read, input_streams)}
    inputs = tuple(_input(read, s, f"{name}-{job_id}") for s in input_streams)
    checkpoint_kind = _checkpoint_kind(read)
    by_table: dict[str, InputStream] = {}
    for i in inputs if checkpoint_kind == "dynamodb" else ():
        other = by_table.setdefault(i.lease_table, i)
        if other is not i:
            raise ConfigurationError(
                f"{other.system_stream} and {i.system_stream} would share the lease table {i.lease_table}, where shard "
                "ids of both would be the same; set aws.kcl.TableName for each stream"
            )
    checkpoint_path = read.text("task.checkpoint.path")
    if checkpoint_kind == "file" and not checkpoint_path:
        raise ConfigurationError("task.checkpoint.path is missing: task.checkpoint.factory wants a directory")
    stores = tuple(_stores(read, serdes))
    if checkpoint_kind == "none" and any(s.changelog for s in stores):
        raise ConfigurationError(
            f"stores.{next(s.name for s in stores if s.changelog)}.changelog needs a place: a changelog is kept beside "
            "the checkpoints; set task.checkpoint.factory to file or dynamodb"
        )
    return Job(
        name=name,
        job_id=job_id,
        task_class=read.required("task.class", "the task's class by its dotted path, such as jobs.delays.DelayTask"),
        inputs=inputs,
        systems=systems,
        options=_options(read),
        serdes=serdes,
        stores=stores,
        checkpoint_kind=checkpoint_kind,
        checkpoint_path=checkpoint_path,
        drop_deserialization_errors=read.flag("task.drop.deserialization.errors"),
        drop_serialization_errors=read.flag("task.drop.serialization.errors"),
        drop_producer_errors=read.flag("task.drop.producer.errors"),
        credentials=_credentials(read, list(systems), input_streams),
        config=job_config,
    )


class _Reader:
    """Typed looks into a configuration."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self.config = config

    def text(self, *keys: str) -> str:
        """Return the first value that is there and not blank, else ""."""
        return next((v for v in (self.config.get(k, "").strip() for k in keys) if v), "")

    def required(self, key: str, what: str) -> str:
        value = self.text(key)
        if not value:
            raise ConfigurationError(f"{key} is missing: {what}")
        return value

    def integer(self, *keys: str) -> int | None:
        for key in keys:
            value = self.text(key)
            if value:
                try:
                    return int(value)
                except ValueError:
                    raise ConfigurationError(f"{key} must be a whole number, got {value!r}") from None
        return None

    def interval_seconds(self, key: str, default_millis: int) -> float | None:
        """Return milliseconds as seconds; None where zero or less: off."""
        millis = self.integer(key)
        millis = default_millis if millis is None else millis
        return millis / 1000 if millis > 0 else None

    def flag(self, *keys: str) -> bool:
        # Java's Boolean.parseBoolean: whatever is not "true" is false. We would rather say so.
        for key in keys:
            value = self.text(key).lower()
            if value:
                if value not in ("true", "false"):
                    raise ConfigurationError(f"{key} must be true or false, got {value!r}")
                return value == "true"
        return False

    def middles(self, before: str, after: str) -> list[str]:
        """Return what stands between `before` and `after` in keys."""
        found = {k[len(before) : -len(after)] for k in self.config if k.startswith(before) and k.endswith(after)}
        return sorted(m for m in found if m)


def _check_keys(config: JobConfig) -> None:
    ignored: list[str] = []
    unknown: list[str] = []
    for key in sorted(config):
        for pattern, reason in _REFUSED.items():
            if re.fullmatch(pattern, key) and config[key].strip().lower() not in ("", "false"):
                raise ConfigurationError(f"{key} is not supported: {reason}")
        if _READ.fullmatch(key):
            continue
        (ignored if _IGNORED.fullmatch(key) else unknown).append(key)
    if ignored:
        _LOG.info("these keys of Samza mean nothing on Beam and are passed over: %s", ", ".join(ignored))
    if unknown:
        _LOG.warning("these keys are not known and are passed over; are they misspelt? %s", ", ".join(unknown))


def _options(read: _Reader) -> TaskOptions:
    if read.flag("task.async.commit"):
        raise ConfigurationError("task.async.commit=true is not supported: a commit is the end of a bundle; remove it")
    elasticity = read.integer("job.elasticity.factor")
    if elasticity is not None and elasticity > 1:
        raise ConfigurationError(
            f"job.elasticity.factor={elasticity} is not supported: it divides a shard among tasks; split the shard"
        )
    grouper = read.text("job.systemstreampartition.grouper.factory")
    if grouper and grouper.rpartition(".")[2] not in _GROUPERS:
        raise ConfigurationError(
            f"job.systemstreampartition.grouper.factory must be one of {', '.join(_GROUPERS)} (whichever it is, each "
            f"shard has a task of its own), got {grouper!r}"
        )
    # Samza's documentation says task.callback.ms, its code reads task.callback.timeout.ms.
    timeout = read.integer("task.callback.timeout.ms", "task.callback.ms")
    concurrency = read.integer("task.max.concurrency")
    return TaskOptions(
        window_seconds=read.interval_seconds("task.window.ms", -1),
        commit_seconds=read.interval_seconds("task.commit.ms", 60_000),
        max_concurrency=1 if concurrency is None else concurrency,
        callback_timeout_seconds=timeout / 1000 if timeout is not None and timeout > 0 else None,
        ignored_exceptions=frozenset(_split(read.text("task.ignored.exceptions"))),
    )


def _kinesis_systems(read: _Reader, inputs: Iterable[SystemStream]) -> list[str]:
    kinesis = [
        s for s in read.middles("systems.", ".samza.factory") if read.text(f"systems.{s}.samza.factory") in _FACTORIES
    ]
    for stream in inputs:
        factory = read.text(f"systems.{stream.system}.samza.factory")
        if not factory:
            raise ConfigurationError(
                f"systems.{stream.system}.samza.factory is missing, and task.inputs names {stream}; "
                f"set it to {_FACTORIES[0]}"
            )
        if factory not in _FACTORIES:
            raise ConfigurationError(
                f"systems.{stream.system}.samza.factory is {factory}, and task.inputs names {stream}: only Kinesis "
                "can be read; give other inputs to a Beam pipeline"
            )
    return kinesis


def _system(read: _Reader, system: str, inputs: Iterable[SystemStream]) -> SystemConfig:
    def aws(key: str) -> str:
        """A stream's value goes before its system's; streams of one system must agree, since they share clients."""
        values = {
            read.text(f"systems.{system}.streams.{s.stream}.{key}", f"systems.{system}.{key}")
            for s in inputs
            if s.system == system
        }
        values = values or {read.text(f"systems.{system}.{key}")}
        if len(values) > 1:
            raise ConfigurationError(
                f"{key} differs between streams of the system {system}: {', '.join(sorted(values))}; "
                "make a system of each"
            )
        return values.pop()

    def number(key: str) -> int | None:
        text = aws(key)
        if text and not text.isdigit():
            raise ConfigurationError(f"systems.{system}.{key} must be a whole number, got {text!r}")
        return int(text) if text else None

    connect = read.integer(f"systems.{system}.aws.clientConfig.ConnectionTimeout")
    socket = read.integer(f"systems.{system}.aws.clientConfig.SocketTimeout")
    connections = read.integer(f"systems.{system}.aws.clientConfig.MaxConnections")
    options: dict[str, Any] = {
        "region": aws("aws.region") or None,
        "endpoint_url": _url(aws("aws.kcl.KinesisEndpoint") or aws("aws.endpoint")),
    }
    if connect:
        options["connect_timeout_seconds"] = connect / 1000
    if socket:
        options["read_timeout_seconds"] = socket / 1000
    if connections:
        options["max_connections"] = connections
    idle = number("aws.kcl.IdleTimeBetweenReadsInMillis")
    return SystemConfig(
        system,
        ClientConfig(**options),
        max_records_per_get=number("aws.kcl.MaxRecords"),
        poll_interval_seconds=idle / 1000 if idle else None,
        dynamodb_endpoint_url=_url(aws("aws.kcl.DynamoDBEndpoint")),
    )


def _url(endpoint: str) -> str | None:
    """The KCL takes a bare host."""
    if not endpoint:
        return None
    return endpoint if "://" in endpoint else f"https://{endpoint}"


def _stream_property(read: _Reader, stream: SystemStream, name: str, *, system_too: bool = False) -> str:
    """Return a stream's `samza.` property, looked for where StreamConfig.getSamzaProperty does, in that order."""
    keys = [f"streams.{_stream_id(read, stream)}.samza.{name}"]
    keys.append(f"systems.{stream.system}.streams.{stream.stream}.samza.{name}")
    keys.append(f"systems.{stream.system}.default.stream.samza.{name}")
    if system_too:
        keys.append(f"systems.{stream.system}.samza.{name}")
    return read.text(*keys)


def _stream_id(read: _Reader, stream: SystemStream) -> str:
    default_system = read.text("job.default.system")
    for stream_id in read.middles("streams.", ".samza.physical.name"):
        system = read.text(f"streams.{stream_id}.samza.system") or default_system
        if system == stream.system and stream.stream in (
            stream_id,
            read.text(f"streams.{stream_id}.samza.physical.name"),
        ):
            return stream_id
    return stream.stream


def _input(read: _Reader, stream: SystemStream, application: str) -> InputStream:
    physical = read.text(
        f"streams.{_stream_id(read, stream)}.samza.physical.name",
        f"systems.{stream.system}.streams.{stream.stream}.samza.physical.name",
    )
    return InputStream(
        SystemStream(stream.system, physical or stream.stream),
        _starting_position(read, stream),
        _stream_property(read, stream, "reset.offset").lower() == "true",
        _kcl(read, stream, "TableName") or _kcl(read, stream, "ApplicationName") or f"{application}-{stream.stream}",
    )


def _kcl(read: _Reader, stream: SystemStream, name: str) -> str:
    system = f"systems.{stream.system}"
    return read.text(f"{system}.streams.{stream.stream}.aws.kcl.{name}", f"{system}.aws.kcl.{name}")


def _starting_position(read: _Reader, stream: SystemStream) -> StartingPosition:
    """The KCL's word goes before Samza's: Samza's own connector does not look at samza.offset.default at all."""
    kcl = _kcl(read, stream, "InitialPositionInStream")
    offset = _stream_property(read, stream, "offset.default", system_too=True)
    if kcl == "TRIM_HORIZON":
        return StartingPosition.trim_horizon()
    if kcl == "LATEST":
        return StartingPosition.latest()
    if kcl == "AT_TIMESTAMP":
        text = _kcl(read, stream, "TimestampAtInitialPositionInStream")
        try:
            # Python 3.10 does not know the Z.
            moment = datetime.datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise ConfigurationError(
                f"TimestampAtInitialPositionInStream of {stream} must be a time with its zone, such as "
                f"2026-01-31T12:00:00+00:00 (a bare number could be seconds or milliseconds), got {text!r}"
            )
        return StartingPosition.at_timestamp(moment)
    if kcl:
        raise ConfigurationError(
            f"InitialPositionInStream of {stream} must be LATEST, TRIM_HORIZON or AT_TIMESTAMP, got {kcl!r}"
        )
    if offset in ("", "upcoming"):
        return StartingPosition.latest()
    if offset == "oldest":
        return StartingPosition.trim_horizon()
    raise ConfigurationError(
        f"samza.offset.default of {stream} must be oldest or upcoming, got {offset!r}"
        + ("; Kinesis can't be asked for a shard's last record" if offset == "newest" else "")
    )


def _serdes(read: _Reader) -> Serdes:
    by_name: dict[str, Serde] = {}
    for name in read.middles("serializers.registry.", ".class"):
        before = f"serializers.registry.{name}."
        options = {
            k[len(before) :]: v for k, v in read.config.items() if k.startswith(before) and k != f"{before}class"
        }
        by_name[name] = serde(read.text(f"{before}class"), options)
    return Serdes(by_name, _serde_names(read, by_name, "key.serde"), _serde_names(read, by_name, "msg.serde"))


def _serde_names(read: _Reader, by_name: dict[str, Serde], kind: str) -> dict[str, str]:
    """Return the names of serdes by `system.stream` and by `system`; registers the well-known ones that are used."""
    names: dict[str, str] = {}
    for system in read.middles("systems.", ".samza.factory"):
        name = read.text(f"systems.{system}.default.stream.samza.{kind}", f"systems.{system}.samza.{kind}")
        if name:
            names[system] = name
        for stream in read.middles(f"systems.{system}.streams.", f".samza.{kind}"):
            names[f"{system}.{stream}"] = read.text(f"systems.{system}.streams.{stream}.samza.{kind}")
    for stream_id in read.middles("streams.", f".samza.{kind}"):
        system = read.text(f"streams.{stream_id}.samza.system", "job.default.system")
        physical = read.text(f"streams.{stream_id}.samza.physical.name") or stream_id
        names[f"{system}.{physical}"] = read.text(f"streams.{stream_id}.samza.{kind}")
    for where, name in names.items():
        _register(by_name, name, f"{where}: samza.{kind}")
    return names


def _register(by_name: dict[str, Serde], name: str, where: str) -> Serde:
    """Return a serde by its registered name; Samza's own names need no registration."""
    if name not in by_name:
        try:
            by_name[name] = serde(name)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{where} is {name!r}: {error}; or register it with serializers.registry.{name}.class"
            ) from error
    return by_name[name]


def _stores(read: _Reader, serdes: Serdes) -> Iterator[StoreConfig]:
    by_name = dict(serdes.by_name)
    for name in read.middles("stores.", ".factory"):
        max_bytes = read.integer(f"stores.{name}.max.bytes")
        key_serde = read.required(f"stores.{name}.key.serde", "the serde of its keys")
        value_serde = read.required(f"stores.{name}.msg.serde", "the serde of its values")
        yield StoreConfig(
            name,
            _register(by_name, key_serde, f"stores.{name}.key.serde"),
            _register(by_name, value_serde, f"stores.{name}.msg.serde"),
            bool(read.text(f"stores.{name}.changelog")),
            MAX_STORE_BYTES if max_bytes is None else max_bytes,
        )


def _checkpoint_kind(read: _Reader) -> str:
    """Samza's connector keeps checkpoints in the KCL's table whatever task.checkpoint.factory says: so the default.

    Of Samza's factories the one that writes files is taken at its word; the others are passed over, with a notice.
    """
    factory = read.text("task.checkpoint.factory")
    if not factory:
        return "dynamodb"
    kind = _CHECKPOINT_KINDS.get(factory.rpartition(".")[2])
    if kind is None:
        if not factory.startswith("org.apache.samza."):
            raise ConfigurationError(f"task.checkpoint.factory must be dynamodb, file, memory or none, got {factory!r}")
        _LOG.warning(
            "task.checkpoint.factory %s is passed over: checkpoints are kept in the KCL's lease table", factory
        )
        return "dynamodb"
    return kind


def _credentials(read: _Reader, systems: Iterable[str], inputs: Iterable[SystemStream]) -> Credentials | None:
    found: set[tuple[str, str]] = set()
    for system in systems:
        for before in [f"systems.{system}.streams.{s.stream}.aws." for s in inputs if s.system == system] + [
            f"systems.{system}.aws."
        ]:
            access = read.text(f"{before}accessKey", f"sensitive.{before}accessKey")
            # Samza's documentation leaves "sensitive." out, its code wants it.
            secret = read.text(f"sensitive.{before}secretKey", f"{before}secretKey")
            if bool(access) != bool(secret):
                missing = "secretKey" if access else "accessKey"
                raise ConfigurationError(
                    f"{before}{missing} is missing: keys come in pairs; or leave both to AWS's chain"
                )
            if access:
                found.add((access, secret))
    if len(found) > 1:
        raise ConfigurationError("the streams have different accessKeys; a job runs with one; let a role do the rest")
    return Credentials(*found.pop()) if found else None
