import datetime

from darkroom.v1 import control_pb2 as _control_pb2
from darkroom.v1 import graph_pb2 as _graph_pb2
from darkroom.v1 import lora_pb2 as _lora_pb2
from darkroom.v1 import stage_pb2 as _stage_pb2
from darkroom.v1 import vae_pb2 as _vae_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "prompt", "negative_prompt", "width_px", "height_px", "step_count", "guidance_scale", "seed", "image_count", "scheduler", "deterministic", "loras", "step_cache_threshold", "preview_interval", "frame_count", "priority", "tenant", "image", "mask", "strength", "controls", "ip_adapters")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    IP_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    prompt: str
    negative_prompt: str
    width_px: int
    height_px: int
    step_count: int
    guidance_scale: float
    seed: int
    image_count: int
    scheduler: str
    deterministic: bool
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    step_cache_threshold: float
    preview_interval: int
    frame_count: int
    priority: int
    tenant: str
    image: bytes
    mask: bytes
    strength: float
    controls: _containers.RepeatedCompositeFieldContainer[_control_pb2.Control]
    ip_adapters: _containers.RepeatedCompositeFieldContainer[_control_pb2.IpAdapter]
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width_px: _Optional[int] = ..., height_px: _Optional[int] = ..., step_count: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., seed: _Optional[int] = ..., image_count: _Optional[int] = ..., scheduler: _Optional[str] = ..., deterministic: _Optional[bool] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ..., step_cache_threshold: _Optional[float] = ..., preview_interval: _Optional[int] = ..., frame_count: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., image: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., strength: _Optional[float] = ..., controls: _Optional[_Iterable[_Union[_control_pb2.Control, _Mapping]]] = ..., ip_adapters: _Optional[_Iterable[_Union[_control_pb2.IpAdapter, _Mapping]]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("node_started", "node_progress", "result")
    NODE_STARTED_FIELD_NUMBER: _ClassVar[int]
    NODE_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    node_started: NodeStarted
    node_progress: NodeProgress
    result: GenerateResult
    def __init__(self, node_started: _Optional[_Union[NodeStarted, _Mapping]] = ..., node_progress: _Optional[_Union[NodeProgress, _Mapping]] = ..., result: _Optional[_Union[GenerateResult, _Mapping]] = ...) -> None: ...

class RunGraphRequest(_message.Message):
    __slots__ = ("request_id", "graph", "deterministic", "priority", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    graph: _graph_pb2.Graph
    deterministic: bool
    priority: int
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., graph: _Optional[_Union[_graph_pb2.Graph, _Mapping]] = ..., deterministic: _Optional[bool] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class RunGraphResponse(_message.Message):
    __slots__ = ("node_started", "node_progress", "result")
    NODE_STARTED_FIELD_NUMBER: _ClassVar[int]
    NODE_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    node_started: NodeStarted
    node_progress: NodeProgress
    result: RunGraphResult
    def __init__(self, node_started: _Optional[_Union[NodeStarted, _Mapping]] = ..., node_progress: _Optional[_Union[NodeProgress, _Mapping]] = ..., result: _Optional[_Union[RunGraphResult, _Mapping]] = ...) -> None: ...

class NodeStarted(_message.Message):
    __slots__ = ("node_id", "stage", "replica_id")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    stage: _stage_pb2.Stage
    replica_id: str
    def __init__(self, node_id: _Optional[str] = ..., stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., replica_id: _Optional[str] = ...) -> None: ...

class NodeProgress(_message.Message):
    __slots__ = ("node_id", "step", "step_count", "previews")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREVIEWS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    step: int
    step_count: int
    previews: _containers.RepeatedCompositeFieldContainer[_vae_pb2.Image]
    def __init__(self, node_id: _Optional[str] = ..., step: _Optional[int] = ..., step_count: _Optional[int] = ..., previews: _Optional[_Iterable[_Union[_vae_pb2.Image, _Mapping]]] = ...) -> None: ...

class NodeTiming(_message.Message):
    __slots__ = ("node_id", "stage", "replica_id", "call_duration", "run_duration", "attempt_count")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CALL_DURATION_FIELD_NUMBER: _ClassVar[int]
    RUN_DURATION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_COUNT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    stage: _stage_pb2.Stage
    replica_id: str
    call_duration: _duration_pb2.Duration
    run_duration: _duration_pb2.Duration
    attempt_count: int
    def __init__(self, node_id: _Optional[str] = ..., stage: _Optional[_Union[_stage_pb2.Stage, str]] = ..., replica_id: _Optional[str] = ..., call_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., run_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., attempt_count: _Optional[int] = ...) -> None: ...

class GenerateResult(_message.Message):
    __slots__ = ("images", "seed", "timings", "total_duration", "batched_forward_count", "cached_forward_count")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_DURATION_FIELD_NUMBER: _ClassVar[int]
    BATCHED_FORWARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_FORWARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[_vae_pb2.Image]
    seed: int
    timings: _containers.RepeatedCompositeFieldContainer[NodeTiming]
    total_duration: _duration_pb2.Duration
    batched_forward_count: int
    cached_forward_count: int
    def __init__(self, images: _Optional[_Iterable[_Union[_vae_pb2.Image, _Mapping]]] = ..., seed: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[NodeTiming, _Mapping]]] = ..., total_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., batched_forward_count: _Optional[int] = ..., cached_forward_count: _Optional[int] = ...) -> None: ...

class RunGraphResult(_message.Message):
    __slots__ = ("images", "timings", "total_duration")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_DURATION_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[NodeImages]
    timings: _containers.RepeatedCompositeFieldContainer[NodeTiming]
    total_duration: _duration_pb2.Duration
    def __init__(self, images: _Optional[_Iterable[_Union[NodeImages, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[NodeTiming, _Mapping]]] = ..., total_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class NodeImages(_message.Message):
    __slots__ = ("node_id", "images")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    images: _containers.RepeatedCompositeFieldContainer[_vae_pb2.Image]
    def __init__(self, node_id: _Optional[str] = ..., images: _Optional[_Iterable[_Union[_vae_pb2.Image, _Mapping]]] = ...) -> None: ...
