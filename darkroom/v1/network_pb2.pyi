import datetime

from darkroom.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CallNetworkRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "network", "method", "arguments_json", "tensors", "deterministic")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_JSON_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    network: str
    method: str
    arguments_json: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    deterministic: bool
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., network: _Optional[str] = ..., method: _Optional[str] = ..., arguments_json: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class CallNetworkResponse(_message.Message):
    __slots__ = ("answer_json", "tensors", "run_duration")
    ANSWER_JSON_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    RUN_DURATION_FIELD_NUMBER: _ClassVar[int]
    answer_json: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    run_duration: _duration_pb2.Duration
    def __init__(self, answer_json: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., run_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
