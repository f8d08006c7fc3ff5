"""The only place where registry keys are built and parsed, so that the layout can be read, and changed, here alone.

/darkroom/v1/members/{stage}/{replica_id}           under the replica's lease
/darkroom/v1/residency/{replica_id}/{model_id}      under the replica's lease
/darkroom/v1/models/{model_id}                      kept, written by the cache manager's leader
/darkroom/v1/election/cachemgr                      under the leader's lease; its creation is the term
/darkroom/v1/cache/plan                             kept, written by the leader
/darkroom/v1/cache/popularity                       kept, written by the leader
/darkroom/v1/cache/habits                           kept, written by the leader
/darkroom/v1/wishes/pins/{model_id}                 kept, written for operators
/darkroom/v1/wishes/once/{wish_id}                  written for operators, removed by the leader
"""

import re
from dataclasses import dataclass

ROOT = "/darkroom/v1/"
MEMBERS = f"{ROOT}members/"
RESIDENCY = f"{ROOT}residency/"
MODELS = f"{ROOT}models/"
ELECTION = f"{ROOT}election/cachemgr"
PLAN = f"{ROOT}cache/plan"
POPULARITY = f"{ROOT}cache/popularity"
HABITS = f"{ROOT}cache/habits"
ASKED = f"{ROOT}wishes/"
PINS = f"{ASKED}pins/"
WISHES = f"{ASKED}once/"

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberKey:
    """Who a member key is about."""

    stage: str
    replica_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyKey:
    """Which model a residency key says is loaded, and where."""

    replica_id: str
    model_id: str


def member(stage: str, replica_id: str) -> str:
    """Raises ValueError for a name that cannot be part of a key."""
    return f"{MEMBERS}{_segment('stage', stage)}/{_segment('replica_id', replica_id)}"


def residency_of(replica_id: str) -> str:
    """The prefix of all that one replica holds. Raises ValueError for a name that cannot be part of a key."""
    return f"{RESIDENCY}{_segment('replica_id', replica_id)}/"


def residency(replica_id: str, model_id: str) -> str:
    """Raises ValueError for a name that cannot be part of a key."""
    return f"{residency_of(replica_id)}{_segment('model_id', model_id)}"


def model(model_id: str) -> str:
    """Raises ValueError for a name that cannot be part of a key."""
    return f"{MODELS}{_segment('model_id', model_id)}"


def pin(model_id: str) -> str:
    """Raises ValueError for a name that cannot be part of a key."""
    return f"{PINS}{_segment('model_id', model_id)}"


def wish(wish_id: str) -> str:
    """Raises ValueError for a name that cannot be part of a key."""
    return f"{WISHES}{_segment('wish_id', wish_id)}"


def parse_pin(key: str) -> str:
    """The model_id. Raises ValueError for any other key."""
    (model_id,) = _segments(key, PINS, 1)
    return model_id


def parse_wish(key: str) -> str:
    """The wish_id. Raises ValueError for any other key."""
    (wish_id,) = _segments(key, WISHES, 1)
    return wish_id


def parse_member(key: str) -> MemberKey:
    """Raises ValueError for any other key."""
    stage, replica_id = _segments(key, MEMBERS, 2)
    return MemberKey(stage=stage, replica_id=replica_id)


def parse_residency(key: str) -> ResidencyKey:
    """Raises ValueError for any other key."""
    replica_id, model_id = _segments(key, RESIDENCY, 2)
    return ResidencyKey(replica_id=replica_id, model_id=model_id)


def parse_model(key: str) -> str:
    """The model_id. Raises ValueError for any other key."""
    (model_id,) = _segments(key, MODELS, 1)
    return model_id


def _segment(name: str, value: str) -> str:
    if not _SEGMENT.fullmatch(value):
        raise ValueError(f"{name} cannot be part of a registry key: {value!r}")
    return value


def _segments(key: str, prefix: str, count: int) -> list[str]:
    segments = key.removeprefix(prefix).split("/")
    if not key.startswith(prefix) or len(segments) != count or not all(map(_SEGMENT.fullmatch, segments)):
        raise ValueError(f"not a key of {prefix}: {key!r}")
    return segments
