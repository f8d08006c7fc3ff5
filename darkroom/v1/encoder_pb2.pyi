import datetime

from darkroom.v1 import lora_pb2 as _lora_pb2
from darkroom.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "prompt", "negative_prompt", "guided", "deterministic", "loras")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    GUIDED_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    prompt: str
    negative_prompt: str
    guided: bool
    deterministic: bool
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., guided: _Optional[bool] = ..., deterministic: _Optional[bool] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("embeddings", "cached", "run_duration")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    RUN_DURATION_FIELD_NUMBER: _ClassVar[int]
    embeddings: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    cached: bool
    run_duration: _duration_pb2.Duration
    def __init__(self, embeddings: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., cached: _Optional[bool] = ..., run_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
