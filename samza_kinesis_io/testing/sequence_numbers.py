"""Sequence numbers in the service's own form: 186 bits, "version 2".

    bits  184-185   always 2
          148-183   when the shard was created, seconds since the epoch
          144-147   shard index, its lowest four bits
           80-143   number of the record in its shard
           72-79    0
           36-71    when the record was taken, seconds since the epoch
            4-35    shard index
            0-3     version, 2

Undocumented; as kinesalite and the KCL's SequenceNumberValidator read it, and checked against real numbers.
The creation time stands highest: a child created at least a second after its parent has the higher numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_VERSION: Final = 2
#: The number that closes a shard, above every record's.
LAST_NUMBER: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class SequenceNumber:
    """What a sequence number says."""

    shard_created_seconds: int
    shard_index: int
    number: int
    seconds: int

    def encode(self) -> int:
        return (
            2 << 184
            | self.shard_created_seconds << 148
            | (self.shard_index & 0xF) << 144
            | self.number << 80
            | self.seconds << 36
            | self.shard_index << 4
            | _VERSION
        )

    @classmethod
    def decode(cls, value: int) -> SequenceNumber:
        """Return what `value` says.

        Raises:
            ValueError: it is no sequence number of version 2.
        """
        if value.bit_length() != 186 or value & 0xF != _VERSION:
            raise ValueError(f"not a sequence number of version 2: {value}")
        return cls(
            shard_created_seconds=value >> 148 & (1 << 36) - 1,
            shard_index=value >> 4 & 0xFFFFFFFF,
            number=value >> 80 & (1 << 64) - 1,
            seconds=value >> 36 & (1 << 36) - 1,
        )
