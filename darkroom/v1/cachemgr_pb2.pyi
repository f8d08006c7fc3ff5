import datetime

from darkroom.v1 import stage_pb2 as _stage_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]

class Band(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BAND_UNSPECIFIED: _ClassVar[Band]
    BAND_HOT: _ClassVar[Band]
    BAND_WARM: _ClassVar[Band]
    BAND_COLD: _ClassVar[Band]
TIER_UNSPECIFIED: Tier
TIER_DEVICE: Tier
TIER_HOST: Tier
TIER_DISK: Tier
BAND_UNSPECIFIED: Band
BAND_HOT: Band
BAND_WARM: Band
BAND_COLD: Band

class ListModelsRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Component(_message.Message):
    __slots__ = ("name", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("model_id", "pipeline", "components", "schedulers", "default_width_px", "default_height_px", "size_multiple_px", "default_step_count", "default_guidance_scale")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    SIZE_MULTIPLE_PX_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    pipeline: str
    components: _containers.RepeatedCompositeFieldContainer[Component]
    schedulers: _containers.RepeatedScalarFieldContainer[str]
    default_width_px: int
    default_height_px: int
    size_multiple_px: int
    default_step_count: int
    default_guidance_scale: float
    def __init__(self, model_id: _Optional[str] = ..., pipeline: _Optional[str] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping]]] = ..., schedulers: _Optional[_Iterable[str]] = ..., default_width_px: _Optional[int] = ..., default_height_px: _Optional[int] = ..., size_multiple_px: _Optional[int] = ..., default_step_count: _Optional[int] = ..., default_guidance_scale: _Optional[float] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "loras", "guides")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    GUIDES_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    loras: _containers.RepeatedCompositeFieldContainer[LoraModel]
    guides: _containers.RepeatedCompositeFieldContainer[GuideModel]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., loras: _Optional[_Iterable[_Union[LoraModel, _Mapping]]] = ..., guides: _Optional[_Iterable[_Union[GuideModel, _Mapping]]] = ...) -> None: ...

class GuideModel(_message.Message):
    __slots__ = ("guide_id", "role", "pipelines", "base_model_id", "size_bytes")
    class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ROLE_UNSPECIFIED: _ClassVar[GuideModel.Role]
        ROLE_CONTROLNET: _ClassVar[GuideModel.Role]
        ROLE_IP_ADAPTER: _ClassVar[GuideModel.Role]
    ROLE_UNSPECIFIED: GuideModel.Role
    ROLE_CONTROLNET: GuideModel.Role
    ROLE_IP_ADAPTER: GuideModel.Role
    GUIDE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    guide_id: str
    role: GuideModel.Role
    pipelines: _containers.RepeatedScalarFieldContainer[str]
    base_model_id: str
    size_bytes: int
    def __init__(self, guide_id: _Optional[str] = ..., role: _Optional[_Union[GuideModel.Role, str]] = ..., pipelines: _Optional[_Iterable[str]] = ..., base_model_id: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class LoraModel(_message.Message):
    __slots__ = ("lora_id", "base_model_id", "default_scale", "size_bytes")
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SCALE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    lora_id: str
    base_model_id: str
    default_scale: float
    size_bytes: int
    def __init__(self, lora_id: _Optional[str] = ..., base_model_id: _Optional[str] = ..., default_scale: _Optional[float] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "stage")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    stage: _stage_pb2.Stage
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., stage: _Optional[_Union[_stage_pb2.Stage, str]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("replica_id", "stage", "address", "device", "model_ids", "residences")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCES_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    stage: _stage_pb2.Stage
    address: str
    device: str
    model_ids: _containers.RepeatedScalarFieldContainer[str]
    residences: _containers.RepeatedCompositeFieldContainer[Residence]
    def __init__(self, replica_id: _Optional[str] = ..., stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., model_ids: _Optional[_Iterable[str]] = ..., residences: _Optional[_Iterable[_Union[Residence, _Mapping]]] = ...) -> None: ...

class Residence(_message.Message):
    __slots__ = ("model_id", "device_bytes", "host_bytes", "disk_bytes", "problem")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    problem: str
    def __init__(self, model_id: _Optional[str] = ..., device_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class LocateResponse(_message.Message):
    __slots__ = ("replicas", "holder_count")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_COUNT_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    holder_count: int
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., holder_count: _Optional[int] = ...) -> None: ...

class DescribeCacheRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class DescribeCacheResponse(_message.Message):
    __slots__ = ("replicas", "leader_id", "manager_id", "plan", "popularities", "loras", "pins")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    LEADER_ID_FIELD_NUMBER: _ClassVar[int]
    MANAGER_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    POPULARITIES_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    leader_id: str
    manager_id: str
    plan: Plan
    popularities: _containers.RepeatedCompositeFieldContainer[Popularity]
    loras: _containers.RepeatedCompositeFieldContainer[LoraPopularity]
    pins: _containers.RepeatedCompositeFieldContainer[PinnedModel]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., leader_id: _Optional[str] = ..., manager_id: _Optional[str] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., popularities: _Optional[_Iterable[_Union[Popularity, _Mapping]]] = ..., loras: _Optional[_Iterable[_Union[LoraPopularity, _Mapping]]] = ..., pins: _Optional[_Iterable[_Union[PinnedModel, _Mapping]]] = ...) -> None: ...

class Popularity(_message.Message):
    __slots__ = ("model_id", "band", "rate", "sites")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    band: Band
    rate: float
    sites: _containers.RepeatedCompositeFieldContainer[Site]
    def __init__(self, model_id: _Optional[str] = ..., band: _Optional[_Union[Band, str]] = ..., rate: _Optional[float] = ..., sites: _Optional[_Iterable[_Union[Site, _Mapping]]] = ...) -> None: ...

class Site(_message.Message):
    __slots__ = ("stage", "machine", "replica_id", "warm_duration", "reason")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    WARM_DURATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    stage: _stage_pb2.Stage
    machine: str
    replica_id: str
    warm_duration: _duration_pb2.Duration
    reason: str
    def __init__(self, stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., machine: _Optional[str] = ..., replica_id: _Optional[str] = ..., warm_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class LoraPopularity(_message.Message):
    __slots__ = ("lora_id", "rate")
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    lora_id: str
    rate: float
    def __init__(self, lora_id: _Optional[str] = ..., rate: _Optional[float] = ...) -> None: ...

class PinnedModel(_message.Message):
    __slots__ = ("model_id", "copy_count")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    COPY_COUNT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    copy_count: int
    def __init__(self, model_id: _Optional[str] = ..., copy_count: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("term", "version", "orders", "releases", "keeps")
    TERM_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    KEEPS_FIELD_NUMBER: _ClassVar[int]
    term: int
    version: int
    orders: _containers.RepeatedCompositeFieldContainer[Order]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    keeps: _containers.RepeatedCompositeFieldContainer[Keep]
    def __init__(self, term: _Optional[int] = ..., version: _Optional[int] = ..., orders: _Optional[_Iterable[_Union[Order, _Mapping]]] = ..., releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ..., keeps: _Optional[_Iterable[_Union[Keep, _Mapping]]] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("replica_id", "model_id", "tier", "reason", "expire_time", "done")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model_id: str
    tier: Tier
    reason: str
    expire_time: _timestamp_pb2.Timestamp
    done: bool
    def __init__(self, replica_id: _Optional[str] = ..., model_id: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., reason: _Optional[str] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., done: _Optional[bool] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("replica_id", "model_id", "expire_time")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model_id: str
    expire_time: _timestamp_pb2.Timestamp
    def __init__(self, replica_id: _Optional[str] = ..., model_id: _Optional[str] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("replica_id", "model_id")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model_id: str
    def __init__(self, replica_id: _Optional[str] = ..., model_id: _Optional[str] = ...) -> None: ...

class ReportUsageRequest(_message.Message):
    __slots__ = ("request_id", "reporter_id", "sequence", "usages", "loads")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REPORTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    USAGES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reporter_id: str
    sequence: int
    usages: _containers.RepeatedCompositeFieldContainer[Usage]
    loads: _containers.RepeatedCompositeFieldContainer[ReplicaLoad]
    def __init__(self, request_id: _Optional[str] = ..., reporter_id: _Optional[str] = ..., sequence: _Optional[int] = ..., usages: _Optional[_Iterable[_Union[Usage, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[ReplicaLoad, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("stage", "model_id", "count", "run_duration", "loras")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    RUN_DURATION_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    stage: _stage_pb2.Stage
    model_id: str
    count: int
    run_duration: _duration_pb2.Duration
    loras: _containers.RepeatedCompositeFieldContainer[LoraUsage]
    def __init__(self, stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., model_id: _Optional[str] = ..., count: _Optional[int] = ..., run_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., loras: _Optional[_Iterable[_Union[LoraUsage, _Mapping]]] = ...) -> None: ...

class LoraUsage(_message.Message):
    __slots__ = ("lora_id", "count")
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    lora_id: str
    count: int
    def __init__(self, lora_id: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("replica_id", "running_count")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    running_count: int
    def __init__(self, replica_id: _Optional[str] = ..., running_count: _Optional[int] = ...) -> None: ...

class ReportUsageResponse(_message.Message):
    __slots__ = ("counted",)
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    counted: bool
    def __init__(self, counted: _Optional[bool] = ...) -> None: ...

class WatchPlanRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class WatchPlanResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "tier", "stage", "replica_id", "copy_count")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    COPY_COUNT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    tier: Tier
    stage: _stage_pb2.Stage
    replica_id: str
    copy_count: int
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., replica_id: _Optional[str] = ..., copy_count: _Optional[int] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "copy_count", "unpin")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    COPY_COUNT_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    copy_count: int
    unpin: bool
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., copy_count: _Optional[int] = ..., unpin: _Optional[bool] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "stage", "replica_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    stage: _stage_pb2.Stage
    replica_id: str
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., replica_id: _Optional[str] = ...) -> None: ...

class DropResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
