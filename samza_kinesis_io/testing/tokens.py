"""What the service hands out and takes back: shard iterators and the tokens of ListShards. Opaque to the caller."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Final

from samza_kinesis_io.testing.faults import FakeServiceError

_ITERATOR_PREFIX: Final = "AAAAAAAAAA"


@dataclass(frozen=True, slots=True)
class ShardIterator:
    """A place in a shard. `generation` tells a stream from an earlier one of the same name."""

    stream_name: str
    generation: int
    shard_index: int
    ordinal: int
    issued_seconds: float

    def encode(self) -> str:
        content = f"{self.stream_name}|{self.generation}|{self.shard_index}|{self.ordinal}|{self.issued_seconds!r}"
        return _ITERATOR_PREFIX + base64.b64encode(content.encode()).decode()

    @classmethod
    def decode(cls, text: object) -> ShardIterator:
        try:
            if not isinstance(text, str) or not text.startswith(_ITERATOR_PREFIX):
                raise ValueError
            content = base64.b64decode(text[len(_ITERATOR_PREFIX) :], validate=True).decode()
            name, generation, index, ordinal, issued = content.split("|")
            return cls(name, int(generation), int(index), int(ordinal), float(issued))
        except ValueError:
            raise FakeServiceError("InvalidArgumentException", "Invalid ShardIterator.") from None


@dataclass(frozen=True, slots=True)
class ListShardsToken:
    """Where the next page of a ListShards begins, and what it lists."""

    stream_name: str
    generation: int
    after_shard_id: str
    shard_filter: dict[str, Any]
    issued_seconds: float

    def encode(self) -> str:
        content = [self.stream_name, self.generation, self.after_shard_id, self.shard_filter, self.issued_seconds]
        return base64.b64encode(json.dumps(content).encode()).decode()

    @classmethod
    def decode(cls, text: object) -> ListShardsToken:
        try:
            name, generation, after, shard_filter, issued = json.loads(base64.b64decode(str(text), validate=True))
            return cls(str(name), int(generation), str(after), dict(shard_filter), float(issued))
        except (ValueError, TypeError):
            raise FakeServiceError("InvalidArgumentException", "Invalid NextToken.") from None
