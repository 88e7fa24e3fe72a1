"""What the connector must know of a runner before the pipeline runs: what to refuse, and how many restrictions to make.

Everything else is decided by behaviour, not by a runner's name. Each refusal stands for a run that was seen to lose
records, to hang or to fail without saying why.
"""

from __future__ import annotations

from typing import Any

from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

from samza_kinesis_io.errors import ConfigurationError

_IN_PROCESS = frozenset({"DirectRunner", "SwitchingDirectRunner", "FnApiRunner", "BundleBasedDirectRunner"})
# Spark takes bounded reads only; their restrictions are spread by the Reshuffle before them.
_PARALLEL = frozenset({"FlinkRunner", "DataflowRunner", "DataflowRunnerV2", "SparkRunner"})
_DEFAULT_PARALLELISM = 4


def runner_name(runner: Any) -> str:
    """Return a runner's class name. The embedded job service of PortableRunner counts as the FnApiRunner it is."""
    return type(runner).__name__


def _options(options: PipelineOptions) -> dict[str, Any]:
    # Runners' own options (Flink's, say) are unknown to the SDK until the job server is asked.
    return options.get_all_options(retain_unknown_options=True)


def check_read(runner: Any, options: PipelineOptions, *, bounded: bool) -> None:
    """Refuse a read that this runner would silently break.

    Raises:
        ConfigurationError: with the options to change.
    """
    name = runner_name(runner)
    given = _options(options)
    embedded = name == "PortableRunner" and given.get("job_endpoint") == "embed"
    if name in _IN_PROCESS or embedded:
        workers = options.view_as(DirectOptions).direct_num_workers
        if workers != 1:
            raise ConfigurationError(
                f"direct_num_workers must be 1 with ReadFromKinesis on {name}, got {workers}: with more workers this "
                "runner drops what a bundle left to be read and still reports DONE. Leave the option out, or use "
                "--runner=PrismRunner."
            )
    if name == "SparkRunner":
        if not bounded:
            raise ConfigurationError(
                "the Spark runner cannot run an unbounded read (its portable runner fails at the first checkpoint or "
                "never ends). Give stop_at=StopPosition.now() for a bounded read, or use the Flink or Prism runner."
            )
        if given.get("streaming"):
            raise ConfigurationError(
                "streaming must not be set with a bounded read on the Spark runner, got --streaming: the job would "
                "never end. Remove it."
            )
    if name == "FlinkRunner" and not bounded:
        missing = [
            flag
            for flag, is_set in (
                ("--streaming", bool(given.get("streaming"))),
                ("--checkpointing_interval=MILLISECONDS", _positive(given.get("checkpointing_interval"))),
                ("--finish_bundle_before_checkpointing", bool(given.get("finish_bundle_before_checkpointing"))),
            )
            if not is_set
        ]
        if missing:
            raise ConfigurationError(
                f"an unbounded read on the Flink runner needs {', '.join(missing)}: without checkpoints nothing "
                "survives a failure, and without --finish_bundle_before_checkpointing a job can hang silently at its "
                "start."
            )


def check_checkpoints(runner: Any, wanted: bool) -> None:
    """Refuse checkpoints of our own where nobody says when a bundle is committed.

    Raises:
        ConfigurationError: on Spark.
    """
    if wanted and runner_name(runner) == "SparkRunner":
        raise ConfigurationError(
            "checkpoints cannot be kept on the Spark runner: its portable runner does not say when a bundle is "
            "committed, and fails when asked. Leave them out (checkpoints=None; task.checkpoint.factory=none for a "
            "task), or use the Flink or Prism runner."
        )


def _positive(value: Any) -> bool:
    try:
        return value is not None and int(value) > 0
    except (TypeError, ValueError):
        return False


def restriction_count(runner: Any, options: PipelineOptions, requested: int | None) -> int:
    """Return into how many restrictions a source's shards are dealt at most.

    One wherever restrictions are run one after the other: there more of them gain nothing, and on Prism watermarks per
    restriction silently drop records as late.

    Raises:
        ConfigurationError: `requested` is more than one on such a runner.
    """
    name = runner_name(runner)
    given = _options(options)
    one_only = name in _IN_PROCESS or name == "PrismRunner" or given.get("job_endpoint") == "embed"
    if requested is not None:
        if isinstance(requested, bool) or not isinstance(requested, int) or requested < 1:
            raise ConfigurationError(f"restrictions must be a whole number >= 1, got {requested!r}")
        if requested > 1 and one_only:
            raise ConfigurationError(
                f"restrictions must be 1 (or left out) on {name}, got {requested}: this runner reads them one after "
                "the other, and a watermark of its own for each makes it drop records as late"
            )
        return requested
    if name in _PARALLEL:
        parallelism = given.get("parallelism")
        return 4 * (int(str(parallelism)) if _positive(parallelism) else _DEFAULT_PARALLELISM)
    return 1
