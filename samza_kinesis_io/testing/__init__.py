"""A Kinesis for tests.

`FakeKinesis` is the service in this process, `LocalKinesis` the same behind HTTP; `SimulatedClock` is its time and
`Faults` what goes wrong. `python -m samza_kinesis_io.testing` runs it alone.
"""

from samza_kinesis_io.testing.client import FakeClientFactory, FakeKinesisClient
from samza_kinesis_io.testing.clock import SimulatedClock
from samza_kinesis_io.testing.fake import FakeKinesis
from samza_kinesis_io.testing.faults import DroppedConnection, FakeServiceError, Fault, Faults
from samza_kinesis_io.testing.local import LocalKinesis

__all__ = [
    "DroppedConnection",
    "FakeClientFactory",
    "FakeKinesis",
    "FakeKinesisClient",
    "FakeServiceError",
    "Fault",
    "Faults",
    "LocalKinesis",
    "SimulatedClock",
]
