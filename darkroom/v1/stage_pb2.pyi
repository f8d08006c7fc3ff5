import datetime

from darkroom.v1 import lora_pb2 as _lora_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_ENCODER: _ClassVar[Stage]
    STAGE_DENOISER: _ClassVar[Stage]
    STAGE_VAE: _ClassVar[Stage]
    STAGE_CONTROLNET: _ClassVar[Stage]
STAGE_UNSPECIFIED: Stage
STAGE_ENCODER: Stage
STAGE_DENOISER: Stage
STAGE_VAE: Stage
STAGE_CONTROLNET: Stage

class DescribeReplicaRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Network(_message.Message):
    __slots__ = ("name", "resident_bytes", "parameter_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    resident_bytes: int
    parameter_count: int
    def __init__(self, name: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., parameter_count: _Optional[int] = ...) -> None: ...

class LoadedModel(_message.Message):
    __slots__ = ("model_id", "networks", "load_duration", "merged_pairs")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    LOAD_DURATION_FIELD_NUMBER: _ClassVar[int]
    MERGED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    networks: _containers.RepeatedCompositeFieldContainer[Network]
    load_duration: _duration_pb2.Duration
    merged_pairs: _containers.RepeatedCompositeFieldContainer[MergedPair]
    def __init__(self, model_id: _Optional[str] = ..., networks: _Optional[_Iterable[_Union[Network, _Mapping]]] = ..., load_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., merged_pairs: _Optional[_Iterable[_Union[MergedPair, _Mapping]]] = ...) -> None: ...

class MergedPair(_message.Message):
    __slots__ = ("loras", "size_bytes")
    LORAS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    size_bytes: int
    def __init__(self, loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class DescribeReplicaResponse(_message.Message):
    __slots__ = ("replica_id", "stage", "device", "models", "running_count", "finished_count", "batch_count", "forward_count", "draining", "uptime_duration")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_COUNT_FIELD_NUMBER: _ClassVar[int]
    FORWARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_DURATION_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    stage: Stage
    device: str
    models: _containers.RepeatedCompositeFieldContainer[LoadedModel]
    running_count: int
    finished_count: int
    batch_count: int
    forward_count: int
    draining: bool
    uptime_duration: _duration_pb2.Duration
    def __init__(self, replica_id: _Optional[str] = ..., stage: _Optional[_Union[Stage, str]] = ..., device: _Optional[str] = ..., models: _Optional[_Iterable[_Union[LoadedModel, _Mapping]]] = ..., running_count: _Optional[int] = ..., finished_count: _Optional[int] = ..., batch_count: _Optional[int] = ..., forward_count: _Optional[int] = ..., draining: _Optional[bool] = ..., uptime_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "loras", "controlnet_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    CONTROLNET_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    controlnet_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ..., controlnet_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PrepareResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...
