from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Control(_message.Message):
    __slots__ = ("controlnet_id", "image", "scale", "start", "end")
    CONTROLNET_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    controlnet_id: str
    image: bytes
    scale: float
    start: float
    end: float
    def __init__(self, controlnet_id: _Optional[str] = ..., image: _Optional[bytes] = ..., scale: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ...) -> None: ...

class IpAdapter(_message.Message):
    __slots__ = ("ip_adapter_id", "image", "scale")
    IP_ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    ip_adapter_id: str
    image: bytes
    scale: float
    def __init__(self, ip_adapter_id: _Optional[str] = ..., image: _Optional[bytes] = ..., scale: _Optional[float] = ...) -> None: ...
