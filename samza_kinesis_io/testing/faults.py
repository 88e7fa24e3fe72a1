"""What goes wrong, on purpose: `Faults` tells a `FakeKinesis` which calls fail, and how.

faults = Faults()
fake = FakeKinesis(faults=faults)
faults.throttle("GetRecords", times=3)
faults.fail_entries(every=2)
lost = faults.drop_connection("PutRecords", moment="after")
...
assert lost.hits == 1
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

#: Whether a fault strikes before the call had its effect, or after: then the work is done and only the answer is bad.
Moment = Literal["before", "after"]
#: How an answer of GetRecords is changed.
Twist = Literal["no children", "no records", "lag"]
#: Decides by a call's parameters whether a fault strikes.
Where = Callable[[Mapping[str, Any]], bool]

#: Every operation, where one is asked for.
ANY_OPERATION: Final = "*"

_MESSAGES: Final[Mapping[str, str]] = {
    "ProvisionedThroughputExceededException": "Rate exceeded for shard.",
    "InternalFailure": "Internal service failure.",
    "InternalFailureException": "Internal service failure.",
    "ExpiredIteratorException": "Iterator expired.",
    "AccessDeniedException": "User is not authorized to perform this action.",
    "KMSDisabledException": "The KMS key is disabled.",
}


class FakeServiceError(Exception):
    """The service's answer is this error. What `FakeKinesis.call` raises where boto3 raises a ClientError."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return (FakeServiceError, (self.code, self.message, self.status))


class DroppedConnection(Exception):
    """The connection broke before an answer came."""


@dataclass(slots=True)
class Fault:
    """One arranged failure. `hits` counts the calls it struck."""

    operation: str
    times: int | None
    after: int
    probability: float
    where: Where | None
    moment: Moment = "before"
    error: FakeServiceError | DroppedConnection | None = None
    delay_seconds: float = 0.0
    entry_code: str = ""
    entry_message: str = ""
    entry_chosen: Callable[[int, Mapping[str, Any]], bool] | None = None
    twist: Twist | None = None
    millis_behind_latest: int = 0
    hits: int = 0
    seen: int = 0

    def cancel(self) -> None:
        """Let it strike no more."""
        self.times = self.hits

    def strikes(self, rng: random.Random) -> bool:
        """Count one call that it could strike; return whether it does."""
        self.seen += 1
        if self.seen <= self.after or (self.times is not None and self.hits >= self.times):
            return False
        if self.probability < 1.0 and rng.random() >= self.probability:
            return False
        self.hits += 1
        return True


@dataclass(slots=True)
class Plan:
    """What happens to one call."""

    rng: random.Random
    delay_seconds: float = 0.0
    error_before: Exception | None = None
    error_after: Exception | None = None
    entries: list[Fault] = field(default_factory=list)
    twists: list[Fault] = field(default_factory=list)

    def twisted(self, twist: Twist) -> Fault | None:
        """Return the fault that changes the answer in this way, if one does. Ask only where the change would show."""
        for fault in self.twists:
            if fault.twist == twist and fault.strikes(self.rng):
                return fault
        return None

    def refusal(self, index: int, entry: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return the code and message with which an entry of a PutRecords fails; None: it is written."""
        for fault in self.entries:
            if fault.entry_chosen is None or fault.entry_chosen(index, entry):
                return fault.entry_code, fault.entry_message
        return None


class Faults:
    """The failures arranged for a fake service. Safe to change while other threads call the service.

    Common arguments, everywhere:
        operation: The API operation; "*" for every one.
        times: How many calls are struck; None: all that come.
        after: How many calls of this operation (that `where` accepts) pass unharmed first.
        where: Called with the parameters; the fault strikes only where it returns True.
        probability: With which each of these calls is struck; drawn from a generator seeded at construction.

    Every method returns its `Fault`, to see its `hits` or to `cancel()` it. Of several faults that would end the same
    call with an error, the one arranged first strikes and the others wait for the next call.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def fail(
        self,
        operation: str,
        code: str,
        *,
        message: str = "",
        status: int | None = None,
        moment: Moment = "before",
        times: int | None = 1,
        after: int = 0,
        where: Where | None = None,
        probability: float = 1.0,
    ) -> Fault:
        """Answer with an error. `status` None: 500 for an InternalFailure or ServiceUnavailable, else 400."""
        if status is None:
            status = 500 if code.startswith(("Internal", "ServiceUnavailable")) else 400
        error = FakeServiceError(code, message or _MESSAGES.get(code, f"{code} (arranged)."), status)
        return self._add(Fault(operation, times, after, probability, where, moment, error))

    def throttle(
        self,
        operation: str,
        *,
        times: int | None = 1,
        after: int = 0,
        where: Where | None = None,
        probability: float = 1.0,
    ) -> Fault:
        """Answer ProvisionedThroughputExceededException."""
        return self.fail(
            operation,
            "ProvisionedThroughputExceededException",
            times=times,
            after=after,
            where=where,
            probability=probability,
        )

    def internal_failure(
        self,
        operation: str,
        *,
        moment: Moment = "before",
        times: int | None = 1,
        after: int = 0,
        where: Where | None = None,
        probability: float = 1.0,
    ) -> Fault:
        """Answer InternalFailureException with status 500."""
        return self.fail(
            operation,
            "InternalFailureException",
            moment=moment,
            times=times,
            after=after,
            where=where,
            probability=probability,
        )

    def deny_access(self, operation: str, *, times: int | None = None, where: Where | None = None) -> Fault:
        """Answer AccessDeniedException, until cancelled."""
        return self.fail(operation, "AccessDeniedException", times=times, where=where)

    def expire_iterators(
        self, *, times: int | None = 1, after: int = 0, where: Where | None = None, probability: float = 1.0
    ) -> Fault:
        """Answer GetRecords with ExpiredIteratorException."""
        return self.fail(
            "GetRecords", "ExpiredIteratorException", times=times, after=after, where=where, probability=probability
        )

    def drop_connection(
        self,
        operation: str,
        *,
        moment: Moment = "before",
        times: int | None = 1,
        after: int = 0,
        where: Where | None = None,
        probability: float = 1.0,
    ) -> Fault:
        """Break the connection. With `moment="after"` the call had its effect: the records are written."""
        error = DroppedConnection(f"connection dropped {moment} {operation} (arranged)")
        return self._add(Fault(operation, times, after, probability, where, moment, error))

    def delay(
        self,
        operation: str,
        seconds: float,
        *,
        times: int | None = 1,
        after: int = 0,
        where: Where | None = None,
        probability: float = 1.0,
    ) -> Fault:
        """Let `seconds` of the service's clock pass before the call."""
        return self._add(Fault(operation, times, after, probability, where, delay_seconds=seconds))

    def fail_entries(
        self,
        *,
        indexes: Collection[int] | None = None,
        every: int | None = None,
        entry_where: Callable[[Mapping[str, Any]], bool] | None = None,
        code: str = "ProvisionedThroughputExceededException",
        message: str = "",
        times: int | None = 1,
        after: int = 0,
        where: Where | None = None,
        probability: float = 1.0,
    ) -> Fault:
        """Fail some entries of a PutRecords; they are not written.

        Args:
            indexes: Which entries of the request, from 0.
            every: Every nth entry, counted over all requests that this fault strikes.
            entry_where: Called with an entry (Data, PartitionKey, ...).
                Several of the three: an entry that one of them chooses fails. None of them: every entry fails.
            code, message: What the entry's ErrorCode and ErrorMessage say.
        """
        if every is not None and every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        counted = 0

        def chosen(index: int, entry: Mapping[str, Any]) -> bool:
            nonlocal counted
            counted += 1
            return (
                (indexes is not None and index in indexes)
                or (every is not None and counted % every == 0)
                or (entry_where is not None and entry_where(entry))
            )

        return self._add(
            Fault(
                "PutRecords",
                times,
                after,
                probability,
                where,
                entry_code=code,
                entry_message=message or _MESSAGES.get(code, f"{code} (arranged)."),
                entry_chosen=None if indexes is None and every is None and entry_where is None else chosen,
            )
        )

    def end_without_children(self, *, times: int | None = 1, after: int = 0, where: Where | None = None) -> Fault:
        """Give a shard's last answer without ChildShards, as some emulators always do. Counts such answers only."""
        return self._add(Fault("GetRecords", times, after, 1.0, where, twist="no children"))

    def empty_answers(self, *, times: int | None = 1, after: int = 0, where: Where | None = None) -> Fault:
        """Answer GetRecords without records though there are some; the iterator stays where it is.

        Counts only the answers that would have had records.
        """
        return self._add(Fault("GetRecords", times, after, 1.0, where, twist="no records"))

    def stuck_lag(self, millis: int, *, times: int | None = None, after: int = 0, where: Where | None = None) -> Fault:
        """Report this MillisBehindLatest where it should be 0, as the service does for some idle streams."""
        return self._add(Fault("GetRecords", times, after, 1.0, where, twist="lag", millis_behind_latest=millis))

    def clear(self) -> None:
        """Take back everything arranged."""
        with self._lock:
            self._faults.clear()

    def plan(self, operation: str, params: Mapping[str, Any]) -> Plan:
        """Decide what happens to one call. For fake services; counts as one call."""
        plan = Plan(self._rng)
        if not self._faults:
            return plan
        with self._lock:
            for fault in self._faults:
                if fault.operation not in (operation, ANY_OPERATION):
                    continue
                if fault.error is not None and (plan.error_before or plan.error_after):
                    continue
                if fault.where is not None and not fault.where(params):
                    continue
                if fault.twist is not None:
                    plan.twists.append(fault)
                elif fault.strikes(self._rng):
                    _put_into(plan, fault)
        return plan

    def _add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault


def _put_into(plan: Plan, fault: Fault) -> None:
    plan.delay_seconds += fault.delay_seconds
    # A copy: an exception that is raised twice would drag the first call's traceback along.
    if fault.error is not None and fault.moment == "before":
        plan.error_before = copy.copy(fault.error)
    elif fault.error is not None:
        plan.error_after = copy.copy(fault.error)
    if fault.entry_code:
        plan.entries.append(fault)
