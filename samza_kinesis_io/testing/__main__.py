"""Run LocalKinesis alone: python -m samza_kinesis_io.testing --stream flights:2"""

from __future__ import annotations

import argparse
import signal
import threading

from samza_kinesis_io.testing.local import LocalKinesis


def _stream(text: str) -> tuple[str, int]:
    name, _, shards = text.partition(":")
    if not name or not (shards or "1").isdecimal() or int(shards or 1) < 1:
        raise argparse.ArgumentTypeError(f"must be NAME or NAME:SHARDS with at least one shard, got {text!r}")
    return name, int(shards or 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m samza_kinesis_io.testing",
        description="Run a Kinesis on this machine, in memory, for tests and trials.",
    )
    parser.add_argument("--port", type=int, default=4567, help="where to listen; 0: a free port (default: %(default)s)")
    parser.add_argument(
        "--stream",
        type=_stream,
        action="append",
        default=[],
        metavar="NAME:SHARDS",
        help="create this stream first; may be repeated",
    )
    parser.add_argument("--enforce-limits", action="store_true", help="throttle per shard as the service does")
    parser.add_argument(
        "--transition-seconds",
        type=float,
        default=0.0,
        help="how long a stream is CREATING, UPDATING or DELETING (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    with LocalKinesis(
        port=args.port, enforce_limits=args.enforce_limits, transition_seconds=args.transition_seconds
    ) as kinesis:
        for name, shards in args.stream:
            kinesis.fake.create_stream(name, shards=shards)
        print(f"LocalKinesis listens on {kinesis.endpoint_url} until interrupted. For AWS clients:\n")
        print(f"export AWS_ENDPOINT_URL_KINESIS={kinesis.endpoint_url}")
        print("export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1", flush=True)
        # Asked for explicitly: a shell's background jobs, and what they start, ignore SIGINT; and stopping a container
        # means SIGTERM.
        over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: over.set())
        over.wait()


if __name__ == "__main__":
    main()
