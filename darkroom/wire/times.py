"""Seconds to protobuf's Duration and back."""

from google.protobuf.duration_pb2 import Duration


def duration(seconds: float) -> Duration:
    """A duration, to the microsecond."""
    message = Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def seconds(message: Duration) -> float:
    """The duration in seconds."""
    return message.ToMicroseconds() / 1e6
