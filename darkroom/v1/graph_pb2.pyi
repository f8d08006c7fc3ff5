from darkroom.v1 import control_pb2 as _control_pb2
from darkroom.v1 import lora_pb2 as _lora_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Graph(_message.Message):
    __slots__ = ("nodes", "edges")
    NODES_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    edges: _containers.RepeatedCompositeFieldContainer[Edge]
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., edges: _Optional[_Iterable[_Union[Edge, _Mapping]]] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("id", "encode_text", "denoise", "decode")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENCODE_TEXT_FIELD_NUMBER: _ClassVar[int]
    DENOISE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    id: str
    encode_text: EncodeText
    denoise: Denoise
    decode: Decode
    def __init__(self, id: _Optional[str] = ..., encode_text: _Optional[_Union[EncodeText, _Mapping]] = ..., denoise: _Optional[_Union[Denoise, _Mapping]] = ..., decode: _Optional[_Union[Decode, _Mapping]] = ...) -> None: ...

class Edge(_message.Message):
    __slots__ = ("from_node", "from_port", "to_node", "to_port")
    FROM_NODE_FIELD_NUMBER: _ClassVar[int]
    FROM_PORT_FIELD_NUMBER: _ClassVar[int]
    TO_NODE_FIELD_NUMBER: _ClassVar[int]
    TO_PORT_FIELD_NUMBER: _ClassVar[int]
    from_node: str
    from_port: str
    to_node: str
    to_port: str
    def __init__(self, from_node: _Optional[str] = ..., from_port: _Optional[str] = ..., to_node: _Optional[str] = ..., to_port: _Optional[str] = ...) -> None: ...

class EncodeText(_message.Message):
    __slots__ = ("model_id", "prompt", "negative_prompt", "guided", "loras")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    GUIDED_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    prompt: str
    negative_prompt: str
    guided: bool
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    def __init__(self, model_id: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., guided: _Optional[bool] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ...) -> None: ...

class Denoise(_message.Message):
    __slots__ = ("model_id", "width_px", "height_px", "step_count", "guidance_scale", "seed", "image_count", "scheduler", "loras", "step_cache_threshold", "preview_interval", "frame_count", "image", "mask", "strength", "controls", "ip_adapters", "from_step", "to_step")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    IP_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    TO_STEP_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    width_px: int
    height_px: int
    step_count: int
    guidance_scale: float
    seed: int
    image_count: int
    scheduler: str
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    step_cache_threshold: float
    preview_interval: int
    frame_count: int
    image: bytes
    mask: bytes
    strength: float
    controls: _containers.RepeatedCompositeFieldContainer[_control_pb2.Control]
    ip_adapters: _containers.RepeatedCompositeFieldContainer[_control_pb2.IpAdapter]
    from_step: int
    to_step: int
    def __init__(self, model_id: _Optional[str] = ..., width_px: _Optional[int] = ..., height_px: _Optional[int] = ..., step_count: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., seed: _Optional[int] = ..., image_count: _Optional[int] = ..., scheduler: _Optional[str] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ..., step_cache_threshold: _Optional[float] = ..., preview_interval: _Optional[int] = ..., frame_count: _Optional[int] = ..., image: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., strength: _Optional[float] = ..., controls: _Optional[_Iterable[_Union[_control_pb2.Control, _Mapping]]] = ..., ip_adapters: _Optional[_Iterable[_Union[_control_pb2.IpAdapter, _Mapping]]] = ..., from_step: _Optional[int] = ..., to_step: _Optional[int] = ...) -> None: ...

class Decode(_message.Message):
    __slots__ = ("model_id", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    parameters: _containers.ScalarMap[str, str]
    def __init__(self, model_id: _Optional[str] = ..., parameters: _Optional[_Mapping[str, str]] = ...) -> None: ...
