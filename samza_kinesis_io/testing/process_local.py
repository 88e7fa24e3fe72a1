"""Objects that pickle as a reference to themselves.

A pipeline pickles its DoFns even when it runs in this process. A fake service or a simulated clock must come out of
the pickle as the very object that the test holds, not as a copy with a life of its own.
"""

from __future__ import annotations

import itertools
import os
import weakref
from typing import Any, TypeVar

_T = TypeVar("_T", bound="ProcessLocal")
_numbers = itertools.count(1)
_living: weakref.WeakValueDictionary[tuple[int, int], ProcessLocal] = weakref.WeakValueDictionary()


class ProcessLocal:
    """Base of what pickles by reference. Unpickling works in the process that made it, while somebody holds it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The process id is part of the key: after a fork the child has a copy that nobody else would see change.
        key = (os.getpid(), vars(self).setdefault("_process_local_number", next(_numbers)))
        _living[key] = self
        return (_find, (type(self).__name__, *key))


def _find(kind: str, pid: int, number: int) -> ProcessLocal:
    found = _living.get((pid, number)) if pid == os.getpid() else None
    if found is None:
        raise LookupError(
            f"{kind} was pickled in process {pid} and cannot be used in process {os.getpid()}, or "
            "nobody holds it any more; for workers in other processes run LocalKinesis and give them its endpoint_url"
        )
    return found
