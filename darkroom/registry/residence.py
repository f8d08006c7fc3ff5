"""What a replica says it has of a model, as the registry keeps it. Pure."""

import json
from dataclasses import asdict, dataclass
from typing import Self

from darkroom.registry.json_fields import finite_or_none, text_or_none, whole_or_none


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """Bytes of a replica's part of a model on each tier; None where it is not there."""

    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    load_s: float | None = None
    """What bringing it to the device took."""
    problem: str | None = None
    """Why bringing it nearer, as the plan wants, failed."""

    def to_json(self) -> bytes:
        """Equal residences give equal bytes."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> Self:
        """Raises ValueError for what is none. Nothing at all means the device, as earlier versions wrote it."""
        if not value:
            return cls(device_bytes=0)
        try:
            fields = json.loads(value)
            return cls(
                device_bytes=whole_or_none(fields.get("device_bytes")),
                host_bytes=whole_or_none(fields.get("host_bytes")),
                disk_bytes=whole_or_none(fields.get("disk_bytes")),
                load_s=finite_or_none(fields.get("load_s")),
                problem=text_or_none(fields.get("problem")),
            )
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a residency: {error!r}") from error


LOADED = Residence(device_bytes=0)
"""On the device, of a size that nobody said."""
