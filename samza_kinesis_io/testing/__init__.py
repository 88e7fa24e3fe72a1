"""A Kinesis for tests: `FakeKinesis` in this process, `SimulatedClock` for its time, `Faults` for its failures."""

from samza_kinesis_io.testing.client import FakeClientFactory, FakeKinesisClient
from samza_kinesis_io.testing.clock import SimulatedClock
from samza_kinesis_io.testing.fake import FakeKinesis
from samza_kinesis_io.testing.faults import DroppedConnection, FakeServiceError, Fault, Faults

__all__ = [
    "DroppedConnection",
    "FakeClientFactory",
    "FakeKinesis",
    "FakeKinesisClient",
    "FakeServiceError",
    "Fault",
    "Faults",
    "SimulatedClock",
]
