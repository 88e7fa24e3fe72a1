"""Every error this package raises, and the one place where the service's errors are classified.

KinesisIOError
├── ConfigurationError           an option is wrong; found at construction (also a ValueError)
├── ServiceError                 Kinesis, or the way to it, answered with an error; carries code and operation
│   ├── TransientServiceError    retryable: 5xx, InternalFailure, a dropped connection, a time-out
│   ├── Throttled                retryable: a limit was met; back off
│   ├── StreamNotReady           retryable: the stream is being created or updated
│   ├── IteratorExpired          the shard iterator is older than five minutes; ask for a new one
│   ├── InvalidArgument          the service refuses a value; what it means depends on the call
│   ├── ResourceNotFound         no such stream or shard
│   │   └── StreamNotFound       no such stream, certainly: fatal
│   └── AccessRefused            credentials, permissions, KMS: fatal until somebody changes them
├── EndpointUnreachable          the endpoint cannot be found or refuses connections: fatal at start
├── DataLoss                     records were dropped by Kinesis before we read them (retention)
│   └── StreamRecreated          the stream is another one than the position came from
├── IncompleteShardList          the listed shards leave a hole in the hash space
├── RecordRefused                a record Kinesis can never take: too large, bad key
├── DeliveryFailed               a batch could not be delivered in time; carries counts by code
├── CheckpointError              a checkpoint can't be read or written
├── StaleAttachment              another attempt reads this restriction now; this one must stop
├── TaskFailed                   (task.py) a task broke a rule: a callback twice, or not in time
├── StoreFull                    (stores.py) an entry, or a task's store, passes its limit; carries both sizes
├── SerdeError                   (serdes.py) a key or message is not what its serde takes (also a ValueError)
├── CodecFailed                  (transforms) an element that can't be decoded or encoded (also a ValueError)
├── SchemaUnavailable            (transforms) the registry of schemas doesn't answer, or refuses
└── UnknownSchema                (transforms) it answers that there is no such schema
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final


class KinesisIOError(Exception):
    """The root of every error this package raises. Not raised itself.

    `retryable` says whether the same call may succeed later without anybody changing anything.
    """

    retryable: ClassVar[bool] = False


class ConfigurationError(KinesisIOError, ValueError):
    """An option is wrong. The message names the option, its value and the fix."""


class ServiceError(KinesisIOError):
    """Kinesis answered a call with an error, or the call did not reach it.

    Attributes:
        operation: The API operation, such as "GetRecords".
        code: The service's error code, such as "ProvisionedThroughputExceededException", or the name of
            the client-side exception where no answer came.
        service_message: The service's own words.
    """

    def __init__(self, message: str, *, operation: str = "", code: str = "", service_message: str = "") -> None:
        super().__init__(message)
        self.operation = operation
        self.code = code
        self.service_message = service_message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_service_error, (type(self), self.args[0], self.operation, self.code, self.service_message))


def _rebuild_service_error(
    kind: type[ServiceError], message: str, operation: str, code: str, service_message: str
) -> ServiceError:
    return kind(message, operation=operation, code=code, service_message=service_message)


class TransientServiceError(ServiceError):
    """The service or the network failed for the moment."""

    retryable = True


class Throttled(ServiceError):
    """A limit of the service was met."""

    retryable = True


class StreamNotReady(ServiceError):
    """The stream is being created, updated or deleted; the call may succeed later."""

    retryable = True


class IteratorExpired(ServiceError):
    """The shard iterator is too old. A new one goes on where it stood."""


class InvalidArgument(ServiceError):
    """The service refuses a value."""


class ResourceNotFound(ServiceError):
    """The stream or the shard does not exist (any more)."""


class StreamNotFound(ResourceNotFound):
    """The stream does not exist in this account and region."""


class AccessRefused(ServiceError):
    """Credentials, permissions or a KMS key stand in the way. Nothing is retried; somebody must act."""


class EndpointUnreachable(KinesisIOError):
    """The endpoint's name is unknown or nothing listens there."""


class DataLoss(KinesisIOError):
    """Kinesis dropped records before they were read. `on_data_loss` decides what happens."""


class StreamRecreated(DataLoss):
    """The position belongs to a stream of the same name that was deleted."""


class IncompleteShardList(KinesisIOError):
    """The shards that the service lists leave a part of the hash space to nobody."""


class RecordRefused(KinesisIOError, ValueError):
    """A record that Kinesis can never take.

    Attributes:
        code: "RecordTooLarge", "InvalidPartitionKey", "InvalidExplicitHashKey", "InvalidData" or
            "SerializationFailed".
        size_bytes, limit_bytes: Data and partition key together, and what the stream takes; 0 where size is
            not the reason.
    """

    def __init__(self, message: str, *, code: str, size_bytes: int = 0, limit_bytes: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_record_refused, (self.args[0], self.code, self.size_bytes, self.limit_bytes))


def _rebuild_record_refused(message: str, code: str, size_bytes: int, limit_bytes: int) -> RecordRefused:
    return RecordRefused(message, code=code, size_bytes=size_bytes, limit_bytes=limit_bytes)


class DeliveryFailed(KinesisIOError):
    """Records could not be delivered. `counts_by_code` says how many entries failed with which code."""

    def __init__(self, message: str, *, counts_by_code: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.counts_by_code: dict[str, int] = dict(counts_by_code or {})

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_delivery_failed, (self.args[0], self.counts_by_code))


def _rebuild_delivery_failed(message: str, counts_by_code: Mapping[str, int]) -> DeliveryFailed:
    return DeliveryFailed(message, counts_by_code=counts_by_code)


class CheckpointError(KinesisIOError):
    """A checkpoint can't be read or written."""


class StaleAttachment(KinesisIOError):
    """A newer attempt has taken over this restriction's shards; the older one must not go on."""


_THROTTLES: Final = frozenset(
    {
        "ProvisionedThroughputExceededException",
        "LimitExceededException",
        "ThrottlingException",
        "Throttling",
        "RequestLimitExceeded",
        "TooManyRequestsException",
        "429",
        "KMSThrottlingException",
    }
)
_ACCESS: Final[Mapping[str, str]] = {
    "AccessDeniedException": "grant the missing permission (docs/runners.md lists the policies)",
    "AccessDenied": "grant the missing permission (docs/runners.md lists the policies)",
    "UnrecognizedClientException": "check the credentials: the service does not know this access key",
    "InvalidClientTokenId": "check the credentials: the service does not know this access key",
    "InvalidSignatureException": "check the secret key and this machine's clock",
    "SignatureDoesNotMatch": "check the secret key",
    "IncompleteSignature": "check the credentials",
    "MissingAuthenticationToken": "give credentials (AWS's usual chain: environment, profile, role)",
    "MissingAuthenticationTokenException": "give credentials (AWS's usual chain: environment, profile, role)",
    "ExpiredToken": "renew the session token",
    "ExpiredTokenException": "renew the session token",
    "OptInRequired": "this account is not subscribed to the service in this region",
    "KMSDisabledException": "enable the stream's KMS key",
    "KMSInvalidStateException": "the stream's KMS key is in a state that forbids its use; see its key state",
    "KMSAccessDeniedException": "grant kms:Decrypt (read) or kms:GenerateDataKey (write) on the stream's key",
    "KMSNotFoundException": "the stream's KMS key does not exist; restore it or change the stream's encryption",
    "KMSOptInRequired": "this account is not subscribed to KMS in this region",
}
_TRANSIENT: Final = frozenset(
    {
        "InternalFailure",
        "InternalFailureException",
        "InternalServerError",
        "InternalError",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ExpiredNextTokenException",
        "500",
        "502",
        "503",
        "504",
    }
)


def classify(*, operation: str, code: str, message: str, status: int, subject: str = "") -> ServiceError:
    """Return the error for one answer of the service.

    Decides by the code alone, then by the HTTP status; an unknown code with a 5xx status is transient,
    any other unknown code is fatal (a plain `ServiceError`).

    Args:
        operation: The API operation.
        code: The service's error code.
        message: The service's own words.
        status: The HTTP status.
        subject: What was asked for, such as "stream flights in eu-west-1"; put into the message.
    """
    kind: type[ServiceError]
    advice = ""
    if code in _THROTTLES:
        kind = Throttled
    elif code in _ACCESS:
        kind, advice = AccessRefused, _ACCESS[code]
    elif code == "ExpiredIteratorException":
        kind = IteratorExpired
    elif code == "ResourceNotFoundException":
        kind, advice = ResourceNotFound, "check the stream's name, the region and the account"
    elif code == "ResourceInUseException":
        kind = StreamNotReady
    elif code in ("InvalidArgumentException", "ValidationException", "InvalidArgument", "SerializationException"):
        kind = InvalidArgument
    elif code in _TRANSIENT or status >= 500:
        kind = TransientServiceError
    else:
        kind = ServiceError
    where = f" for {subject}" if subject else ""
    text = f"{operation}{where} failed: {code}: {message}"
    if advice:
        text += f" ({advice})"
    return kind(text, operation=operation, code=code, service_message=message)
