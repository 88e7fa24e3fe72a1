"""The runners, what each can do, and how a pipeline is started on it.

A test says which features it needs and runs on every runner that has them. Flink and Spark are not installed by this
repository: name a job server that runs, in BEAM_FLINK_JOB_SERVER and BEAM_SPARK_JOB_SERVER (host:port), or have
`beam-runners-*-job-server` where Beam can download it.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import apache_beam
from apache_beam.runners.portability.job_server import JavaJarJobServer
from portable import pipelines
from portable.pipelines import Read

import tiers


class Feature(enum.Enum):
    BOUNDED = "a bounded read"
    UNBOUNDED = "an unbounded read"
    WINDOWS = "windows that close while the source runs"
    OTHER_PROCESS = "workers in another process"
    DRIVER_IS_WORKER = "workers that are threads of the driver's process"
    RUNNER_SPLITS = "bundles that the runner splits"
    CANCEL = "cancel() that ends the reading"
    NO_RETRY = "a failure ends the job"
    NOTICES_DEATH = "the death of a worker ends the job"
    BUNDLE_RETRY = "a bundle that failed is run again"
    WORKER_RETRY = "a worker that died is replaced"
    SAVEPOINTS = "a new job goes on where an old one stopped"
    OVERLAP = "restrictions that are read side by side"


class Job:
    """A pipeline that runs, in a thread of this process or in a process of its own."""

    def __init__(self, run: Callable[[], Any], result: Any = None, interrupt: Callable[[], None] | None = None) -> None:
        self.result = result
        self.error: BaseException | None = None
        self._interrupt = interrupt
        self._thread = threading.Thread(target=self._run, args=(run,), name="job", daemon=True)
        self._thread.start()

    def _run(self, run: Callable[[], Any]) -> None:
        try:
            run()
        except BaseException as error:
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait_until(self, what: str, condition: Callable[[], bool], *, timeout_seconds: float = 90) -> None:
        """Wait, with patience for a busy machine, but not beyond the job's own end."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if not self.is_running and not condition():
                raise AssertionError(f"the job ended before {what}") from self.error
            assert time.monotonic() < deadline, f"{timeout_seconds:.0f} s passed, but not: {what}"
            time.sleep(0.05)

    def wait_for_end(self, *, timeout_seconds: float = 90) -> None:
        """Wait until the job has ended, and raise what ended it."""
        self._thread.join(timeout_seconds)
        assert not self.is_running, f"the job still runs after {timeout_seconds:.0f} s"
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Wait for its end, and interrupt it if it does not come; for the end of a test."""
        self._thread.join(10)
        if self.is_running and self._interrupt is not None:
            self._interrupt()
        elif self.is_running and self.result is not None:
            with contextlib.suppress(Exception):
                self.result.cancel()


Arguments = Callable[[contextlib.ExitStack], list[str]]


@dataclass(frozen=True)
class Runner:
    name: str
    features: frozenset[Feature]
    arguments: Arguments
    """Start what the runner needs beside this process, until the stack is closed, and return the command line."""
    home: Callable[[Path], None] | None = None
    """Prepare a home directory for a driver in a process of its own; None: the driver is this process."""

    def start(
        self,
        stack: contextlib.ExitStack,
        name: str,
        endpoint_url: str,
        read: Read,
        *,
        more_arguments: Sequence[str] = (),
    ) -> Job:
        arguments = [*self.arguments(stack), *more_arguments]
        job = (
            _in_this_process(name, endpoint_url, read, arguments)
            if self.home is None
            else _in_its_own(stack, self.home, name, endpoint_url, read, arguments)
        )
        return job


def _in_this_process(name: str, endpoint_url: str, read: Read, arguments: list[str]) -> Job:
    pipeline = pipelines.build(name, endpoint_url, read, arguments)  # what it refuses, it refuses here
    if arguments[0] == "--runner=FnApiRunner":
        # Its run() returns when the pipeline has ended.
        return Job(lambda: pipeline.run().wait_until_finish())
    # Not in the job's thread: job servers that are started here want to hear of signals.
    result = pipeline.run()
    return Job(lambda: result.wait_until_finish(), result)


def _in_its_own(
    stack: contextlib.ExitStack,
    prepare_home: Callable[[Path], None],
    name: str,
    endpoint_url: str,
    read: Read,
    arguments: list[str],
) -> Job:
    home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    prepare_home(home)
    process = subprocess.Popen(
        [sys.executable, "-m", "portable.pipelines", name, endpoint_url, json.dumps(asdict(read)), *arguments],
        env={**worker_environment(), "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def run() -> None:
        told = process.communicate()[0].decode()
        if process.returncode:
            raise RuntimeError(f"the driver ended with status {process.returncode}: {told[-5000:]}")

    def interrupt() -> None:
        process.send_signal(signal.SIGINT)  # on anything harder it would leave its Prism behind
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()

    return Job(run, interrupt=interrupt)


def worker_environment() -> dict[str, str]:
    """Return the environment of a process that imports the package, this module and a Python by its bare name."""
    paths = [str(tiers.ROOT), str(tiers.ROOT / "tests")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def worker_pool() -> Iterator[str]:
    """Start a worker pool, which starts a Python process for each worker that is asked for; return its address.

    A worker that is killed stays dead: the pool does not watch it, the runner must.
    """
    port = free_port()
    with tempfile.TemporaryFile() as told:
        pool = subprocess.Popen(
            [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"],
            env=worker_environment(),
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not _listens(port):
                told.seek(0)
                assert pool.poll() is None, f"the worker pool ended: {told.read().decode()[-3000:]}"
                assert time.monotonic() < deadline, "the worker pool does not listen after 60 s"
                time.sleep(0.05)
            yield f"localhost:{port}"
        finally:
            # It and its workers: they are a process group of their own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pool.pid, signal.SIGKILL)
            pool.wait()


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _pool(stack: contextlib.ExitStack) -> list[str]:
    return ["--environment_type=EXTERNAL", f"--environment_config={stack.enter_context(worker_pool())}"]


# The local runners.


def _prism(_: contextlib.ExitStack) -> list[str]:
    return ["--runner=PrismRunner", f"--prism_location={tiers.prism()}"]


def _stage_prism(home: Path) -> None:
    cache = home / ".apache_beam/cache/prism/bin"
    cache.mkdir(parents=True)
    # Under this name the DirectRunner finds it instead of downloading it; it may be a plain binary.
    shutil.copy(tiers.prism(), cache / f"apache_beam-v{apache_beam.__version__}-prism-linux-amd64.zip")


_EMBED = ["--runner=PortableRunner", "--job_endpoint=embed"]
_LOCAL = frozenset({Feature.BOUNDED, Feature.UNBOUNDED, Feature.NO_RETRY})
_PRISM = _LOCAL | {Feature.WINDOWS, Feature.CANCEL, Feature.RUNNER_SPLITS}

# Flink and Spark.

#: Every millisecond of a bundle is latency on Flink; without the last option a job can hang silently at its start.
FLINK_STREAMING = [
    "--streaming",
    "--checkpointing_interval=1000",
    "--max_bundle_time_mills=10",
    "--finish_bundle_before_checkpointing",
]
FLINK_RETRIES = ["--number_of_execution_retries=10", "--execution_retry_delay=100"]


def _flink(*more: str) -> Arguments:
    def arguments(_: contextlib.ExitStack) -> list[str]:
        jvm = [f"--job_server_jvm_properties=--add-opens=java.base/{p}=ALL-UNNAMED" for p in ("java.lang", "java.util")]
        where = _endpoint_or_jar(
            "BEAM_FLINK_JOB_SERVER",
            "runners:flink:1.20:job-server:shadowJar",
            "Flink",
            ["--flink_version=1.20", *jvm],
        )
        return ["--runner=FlinkRunner", "--parallelism=2", *where, *more]

    return arguments


def _flink_pool(stack: contextlib.ExitStack) -> list[str]:
    return [*_flink(*FLINK_STREAMING, *FLINK_RETRIES)(stack), *_pool(stack)]


def rest_api() -> str:
    """Return host:port of the REST API of the session cluster that the Flink job server submits to."""
    if "BEAM_FLINK_JOB_SERVER" not in os.environ or "BEAM_FLINK_REST" not in os.environ:
        _missing("BEAM_FLINK_JOB_SERVER=host:port and its cluster's REST API, BEAM_FLINK_REST=host:port", "Flink")
    return os.environ["BEAM_FLINK_REST"]


def _spark(_: contextlib.ExitStack) -> list[str]:
    where = _endpoint_or_jar(
        "BEAM_SPARK_JOB_SERVER", "runners:spark:3:job-server:shadowJar", "Spark", ["--spark_master_url=local[2,4]"]
    )
    return ["--runner=SparkRunner", *where, "--environment_type=LOOPBACK"]


def _endpoint_or_jar(variable: str, gradle_target: str, what: str, with_jar: list[str]) -> list[str]:
    endpoint = os.environ.get(variable)
    if endpoint:
        return [f"--job_endpoint={endpoint}"]
    if _released_jar_answers(gradle_target) and shutil.which("java"):
        return with_jar
    _missing(variable, what)


def _missing(variable: str, what: str) -> NoReturn:
    tiers.missing(
        f"a {what} job server",
        f"this runs on {what}, which this repository does not install",
        f"start one and name it, {variable}{'' if '=' in variable else '=host:port'}; see docs/runners.md",
        may_be_missing=True,
    )


_answers: dict[str, bool] = {}


def _released_jar_answers(gradle_target: str) -> bool:
    """Return whether Beam could download the released job server here; asked once, and not for long."""
    if gradle_target not in _answers:
        jar = JavaJarJobServer.path_to_beam_jar(f":{gradle_target}")
        if os.path.exists(jar):
            return True
        try:
            urllib.request.urlopen(urllib.request.Request(jar, method="HEAD"), timeout=5).close()
            _answers[gradle_target] = True
        except (urllib.error.URLError, OSError, ValueError):
            _answers[gradle_target] = False
    return _answers[gradle_target]


FN_API = Runner("FnApiRunner", _LOCAL | {Feature.DRIVER_IS_WORKER}, lambda _: ["--runner=FnApiRunner"])
PRISM = Runner("Prism", _PRISM | {Feature.DRIVER_IS_WORKER}, _prism)
DIRECT_ON_PRISM = Runner(
    "DirectRunner-on-Prism",
    frozenset({Feature.BOUNDED, Feature.UNBOUNDED, Feature.WINDOWS}),
    lambda _: ["--runner=DirectRunner"],
    home=_stage_prism,
)
EMBEDDED = Runner(
    "embedded-job-service",
    _LOCAL | {Feature.DRIVER_IS_WORKER},
    lambda _: [*_EMBED, "--environment_type=LOOPBACK"],
)
# Without NOTICES_DEATH: it may wait for a dead worker for ever, and then keeps its own process from ending.
EMBEDDED_POOL = Runner(
    "embedded-job-service-worker-pool", _LOCAL | {Feature.OTHER_PROCESS}, lambda stack: [*_EMBED, *_pool(stack)]
)
PRISM_POOL = Runner(
    "Prism-worker-pool",
    _PRISM | {Feature.OTHER_PROCESS, Feature.NOTICES_DEATH},
    lambda stack: [*_prism(stack), *_pool(stack)],
)
FLINK = Runner(
    "Flink",
    _LOCAL | {Feature.WINDOWS, Feature.DRIVER_IS_WORKER, Feature.OVERLAP},
    _flink(*FLINK_STREAMING, "--number_of_execution_retries=0", "--environment_type=LOOPBACK"),
)
FLINK_RETRYING = Runner(
    "Flink-restarting",
    frozenset({Feature.BUNDLE_RETRY, Feature.UNBOUNDED, Feature.OVERLAP}),
    _flink(*FLINK_STREAMING, *FLINK_RETRIES, "--environment_type=LOOPBACK"),
)
FLINK_POOL = Runner(
    "Flink-worker-pool", frozenset({Feature.WORKER_RETRY, Feature.UNBOUNDED, Feature.OVERLAP}), _flink_pool
)
FLINK_CLUSTER = Runner(
    "Flink-cluster",
    frozenset({Feature.SAVEPOINTS, Feature.UNBOUNDED, Feature.OVERLAP}),
    _flink(
        *FLINK_STREAMING,
        "--environment_type=LOOPBACK",
        "--externalized_checkpoints_enabled",
        "--retain_externalized_checkpoints_on_cancellation",
    ),
)
FLINK_BATCH = Runner(
    "Flink-batch", frozenset({Feature.BOUNDED, Feature.OVERLAP}), _flink("--environment_type=LOOPBACK")
)
SPARK = Runner("Spark", frozenset({Feature.BOUNDED, Feature.BUNDLE_RETRY, Feature.NO_RETRY, Feature.OVERLAP}), _spark)

RUNNERS = (
    FN_API,
    PRISM,
    DIRECT_ON_PRISM,
    EMBEDDED,
    EMBEDDED_POOL,
    PRISM_POOL,
    FLINK,
    FLINK_RETRYING,
    FLINK_POOL,
    FLINK_CLUSTER,
    FLINK_BATCH,
    SPARK,
)
