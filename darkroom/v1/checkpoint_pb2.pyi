from darkroom.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Checkpoint(_message.Message):
    __slots__ = ("format_version", "epoch", "step", "step_count", "task_digest", "made_by", "state_json", "tensors", "digest")
    class MadeByEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    TASK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MADE_BY_FIELD_NUMBER: _ClassVar[int]
    STATE_JSON_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    epoch: int
    step: int
    step_count: int
    task_digest: str
    made_by: _containers.ScalarMap[str, str]
    state_json: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    digest: str
    def __init__(self, format_version: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., step_count: _Optional[int] = ..., task_digest: _Optional[str] = ..., made_by: _Optional[_Mapping[str, str]] = ..., state_json: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., digest: _Optional[str] = ...) -> None: ...
