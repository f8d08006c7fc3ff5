from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Lora(_message.Message):
    __slots__ = ("lora_id", "scale")
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    lora_id: str
    scale: float
    def __init__(self, lora_id: _Optional[str] = ..., scale: _Optional[float] = ...) -> None: ...
