from darkroom.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("replica_id", "stage", "address", "device", "model_ids")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    stage: _stage_pb2.Stage
    address: str
    device: str
    model_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replica_id: _Optional[str] = ..., stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., model_ids: _Optional[_Iterable[str]] = ...) -> None: ...

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
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...
