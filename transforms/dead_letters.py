"""What becomes of an element that a codec cannot take: it fails the pipeline, or it is set aside as a value.

Either way it is counted. What is not the element's fault, such as a registry that does not answer, is neither: it fails
the bundle, which the runner tries again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

import apache_beam as beam
import msgspec
from apache_beam import coders, pvalue
from apache_beam.metrics import Metrics

from samza_kinesis_io.errors import ConfigurationError, KinesisIOError
from samza_kinesis_io.metrics import NAMESPACE
from samza_kinesis_io.records import KinesisRecord

_FAILED: Final = "failed"
_SHOWN_CHARACTERS: Final = 200


class CodecFailed(KinesisIOError, ValueError):
    """An element cannot be decoded or encoded, and nobody wants it set aside. The cause says why."""


class SchemaUnavailable(KinesisIOError):
    """The schema registry did not answer. Not the element's fault: the bundle fails and is tried again."""

    retryable = True


class FailedElement(msgspec.Struct, frozen=True):
    """An element that could not be decoded or encoded.

    Attributes:
        element: As it came in: a `KinesisRecord` or bytes to decode, anything to encode.
        error_type: The error's class: "DecodeError" (no JSON), "ValidationError" (JSON of another shape), ...
        message: Why, in words.
    """

    element: Any
    error_type: str
    message: str


class FailedElementCoder(coders.Coder):
    """Wire form: a tuple of the fields, by Beam's own coder for primitives, which pickles what it does not know."""

    def __init__(self) -> None:
        self._tuples = coders.FastPrimitivesCoder()

    def encode(self, value: FailedElement) -> bytes:
        encoded: bytes = self._tuples.encode(msgspec.structs.astuple(value))
        return encoded

    def decode(self, encoded: bytes) -> FailedElement:
        return FailedElement(*self._tuples.decode(encoded))

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> type[FailedElement]:
        return FailedElement

    def __reduce__(self) -> tuple[Any, ...]:
        return (FailedElementCoder, ())

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


coders.registry.register_coder(FailedElement, FailedElementCoder)


class Codec(Protocol):
    """What a codec's transform carries to the workers: configuration only, picklable."""

    def open(self) -> Callable[[Any], Any]:
        """Return the function from element to output. It raises whatever it likes for an element it cannot take."""
        ...


class CodecTransform(beam.PTransform[Any, Any]):
    """The common half of the codecs' transforms.

    Gives a PCollection; with `dead_letters=True` a pair of it and the `FailedElement`s. With an error handler
    those go there, and it is a PCollection again.
    """

    _result: ClassVar[Any]
    _error_counter: ClassVar[str]

    def __init__(self, codec: Codec, output_type: Any, dead_letters: bool) -> None:
        super().__init__()
        if not isinstance(dead_letters, bool):
            raise ConfigurationError(f"dead_letters must be True or False, got {dead_letters!r}")
        self._codec = codec
        self._output_type = output_type
        self._dead_letters = dead_letters
        self._error_handler: Any = None

    def with_error_handler(self, error_handler: Any) -> Any:
        """Give failed elements to an error handler of `apache_beam.transforms.error_handling`; None: do not."""
        self._error_handler = error_handler
        return self

    def expand(self, input_or_inputs: pvalue.PCollection[Any]) -> Any:
        sets_aside = self._dead_letters or self._error_handler is not None
        convert = beam.ParDo(_CodecFn(self._codec, self._error_counter, sets_aside)).with_output_types(
            self._output_type
        )
        if not sets_aside:
            return input_or_inputs | convert
        outputs = input_or_inputs | convert.with_outputs(_FAILED, main="converted")
        failed = outputs[_FAILED]
        failed.element_type = FailedElement
        if self._error_handler is not None:
            self._error_handler.add_error_pcollection(failed)
            return outputs["converted"]
        return type(self)._result(outputs["converted"], failed)


class _CodecFn(beam.DoFn):
    def __init__(self, codec: Codec, error_counter: str, sets_aside: bool) -> None:
        self._codec = codec
        self._sets_aside = sets_aside
        self._errors = Metrics.counter(NAMESPACE, error_counter)

    def setup(self) -> None:
        self._convert = self._codec.open()

    def process(self, element: Any) -> list[Any]:
        try:
            return [self._convert(element)]
        except SchemaUnavailable:
            raise
        # Any error: what a parser raises for bytes that somebody made up has no common root.
        except Exception as exc:
            self._errors.inc()
            if not self._sets_aside:
                raise CodecFailed(
                    f"{_shown(element)}: {_words(exc)}. Use dead_letters=True to set such elements aside"
                ) from exc
            return [pvalue.TaggedOutput(_FAILED, FailedElement(element, type(exc).__name__, _words(exc)))]


def _words(exc: Exception) -> str:
    return str(exc) or type(exc).__name__


def _shown(element: Any) -> str:
    if isinstance(element, KinesisRecord):
        return (
            f"record {element.sequence_number} (sub-sequence number {element.sub_sequence_number}) of shard "
            f"{element.shard_id or '?'} of stream {element.stream or '?'}"
        )
    return f"element {element!r:.{_SHOWN_CHARACTERS}}"
