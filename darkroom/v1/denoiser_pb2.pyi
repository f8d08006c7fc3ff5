import datetime

from darkroom.v1 import checkpoint_pb2 as _checkpoint_pb2
from darkroom.v1 import control_pb2 as _control_pb2
from darkroom.v1 import lora_pb2 as _lora_pb2
from darkroom.v1 import tensor_pb2 as _tensor_pb2
from darkroom.v1 import vae_pb2 as _vae_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DenoiseRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "embeddings", "width_px", "height_px", "step_count", "guidance_scale", "seed", "image_count", "scheduler", "deterministic", "checkpoint_interval", "checkpoint", "from_step", "to_step", "epoch", "priority", "tenant", "run_id", "loras", "step_cache_threshold", "preview_interval", "frame_count", "image", "mask", "strength", "controls", "ip_adapters")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    TO_STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    IP_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    embeddings: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    width_px: int
    height_px: int
    step_count: int
    guidance_scale: float
    seed: int
    image_count: int
    scheduler: str
    deterministic: bool
    checkpoint_interval: int
    checkpoint: _checkpoint_pb2.Checkpoint
    from_step: int
    to_step: int
    epoch: int
    priority: int
    tenant: str
    run_id: str
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    step_cache_threshold: float
    preview_interval: int
    frame_count: int
    image: bytes
    mask: bytes
    strength: float
    controls: _containers.RepeatedCompositeFieldContainer[_control_pb2.Control]
    ip_adapters: _containers.RepeatedCompositeFieldContainer[_control_pb2.IpAdapter]
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., embeddings: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., width_px: _Optional[int] = ..., height_px: _Optional[int] = ..., step_count: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., seed: _Optional[int] = ..., image_count: _Optional[int] = ..., scheduler: _Optional[str] = ..., deterministic: _Optional[bool] = ..., checkpoint_interval: _Optional[int] = ..., checkpoint: _Optional[_Union[_checkpoint_pb2.Checkpoint, _Mapping]] = ..., from_step: _Optional[int] = ..., to_step: _Optional[int] = ..., epoch: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., run_id: _Optional[str] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ..., step_cache_threshold: _Optional[float] = ..., preview_interval: _Optional[int] = ..., frame_count: _Optional[int] = ..., image: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., strength: _Optional[float] = ..., controls: _Optional[_Iterable[_Union[_control_pb2.Control, _Mapping]]] = ..., ip_adapters: _Optional[_Iterable[_Union[_control_pb2.IpAdapter, _Mapping]]] = ...) -> None: ...

class DenoiseResponse(_message.Message):
    __slots__ = ("progress", "result", "alive")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    progress: DenoiseProgress
    result: DenoiseResult
    alive: DenoiseAlive
    def __init__(self, progress: _Optional[_Union[DenoiseProgress, _Mapping]] = ..., result: _Optional[_Union[DenoiseResult, _Mapping]] = ..., alive: _Optional[_Union[DenoiseAlive, _Mapping]] = ...) -> None: ...

class DenoiseAlive(_message.Message):
    __slots__ = ("started",)
    STARTED_FIELD_NUMBER: _ClassVar[int]
    started: bool
    def __init__(self, started: _Optional[bool] = ...) -> None: ...

class DenoiseProgress(_message.Message):
    __slots__ = ("step", "step_count", "checkpoint", "previews")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PREVIEWS_FIELD_NUMBER: _ClassVar[int]
    step: int
    step_count: int
    checkpoint: _checkpoint_pb2.Checkpoint
    previews: _containers.RepeatedCompositeFieldContainer[_vae_pb2.Image]
    def __init__(self, step: _Optional[int] = ..., step_count: _Optional[int] = ..., checkpoint: _Optional[_Union[_checkpoint_pb2.Checkpoint, _Mapping]] = ..., previews: _Optional[_Iterable[_Union[_vae_pb2.Image, _Mapping]]] = ...) -> None: ...

class DenoiseResult(_message.Message):
    __slots__ = ("latents", "run_duration", "forward_count", "batched_forward_count", "pushed_out_count", "cached_forward_count")
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    RUN_DURATION_FIELD_NUMBER: _ClassVar[int]
    FORWARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    BATCHED_FORWARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    PUSHED_OUT_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_FORWARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    latents: _tensor_pb2.Tensor
    run_duration: _duration_pb2.Duration
    forward_count: int
    batched_forward_count: int
    pushed_out_count: int
    cached_forward_count: int
    def __init__(self, latents: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., run_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., forward_count: _Optional[int] = ..., batched_forward_count: _Optional[int] = ..., pushed_out_count: _Optional[int] = ..., cached_forward_count: _Optional[int] = ...) -> None: ...
