"""Pictures as they are received: image files from anybody, read without trusting them.

The header is read first, by this module: no decoder sees a file of another size than the one asked for, of more than
one frame, or with data beside the picture. Rule kept: whatever the bytes, the answer is a picture or an InvalidField.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from darkroom.errors import InvalidField
from darkroom.wire.conditions import MAX_FILE_BYTES

MAX_PIXELS = 1 << 24
"""Of a picture that may have any size."""
MAX_RATIO = 16
"""Of its sides: image encoders' readers scale the shorter one up to their own."""
_MAX_JPEG_SCANS = 64
"""Each scan of a progressive JPEG is a pass over the whole picture; cameras and programs write about ten."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"})
_JPEG_MARK = 0xFF
_JPEG_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_FAR_TOO_MANY_PARTS = 10_000
"""Chunks of a PNG, segments of a JPEG: a large picture has some hundreds."""


class _Unreadable(Exception):
    """No picture. The message goes on after the field's name."""


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says of itself."""

    kind: str
    width_px: int
    height_px: int


def decode_picture(field: str, data: bytes, size: tuple[int, int] | None, mode: str) -> Image.Image:
    """The picture in a PNG, JPEG or WebP file, as RGB or, with `mode` L, in shades of grey.

    It is turned the way its EXIF orientation says. What is transparent shows white, in shades of grey black: of a mask
    it is kept. `size`: width and height in pixels; None means any, up to MAX_PIXELS and MAX_RATIO. Raises InvalidField,
    naming `field`, unless the file holds one picture of exactly this size.
    """
    try:
        picture = _decoded(data, size)
    except _Unreadable as problem:
        raise InvalidField(field, str(problem)) from problem
    if size is not None and picture.size != size:
        raise InvalidField(field, _wrong_size(picture.size, size))
    return _converted(picture, mode)


def _decoded(data: bytes, size: tuple[int, int] | None) -> Image.Image:
    header = _header(data)
    found = (header.width_px, header.height_px)
    if size is not None and found not in (size, size[::-1]):  # it may be turned
        raise _Unreadable(_wrong_size(found, size))
    if not 0 < found[0] * found[1] <= MAX_PIXELS:
        raise _Unreadable(f"must have 1 to {MAX_PIXELS} pixels, not {found[0]}x{found[1]}")
    if size is None and max(found) > MAX_RATIO * min(found):
        raise _Unreadable(f"must be at most {MAX_RATIO} times as long as wide, not {found[0]}x{found[1]}")
    if header.kind == "PNG":
        data = _bare_png(data)
    elif header.kind == "JPEG" and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise _Unreadable(f"is a JPEG of more than {_MAX_JPEG_SCANS} scans")
    try:
        with Image.open(io.BytesIO(data), formats=(header.kind,)) as opened:
            if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":  # a JPEG with a second one, unseen
                raise _Unreadable("is animated; it must be one picture")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        EOFError,
        SyntaxError,
        MemoryError,
        RuntimeError,
        struct.error,
        zlib.error,
        Warning,
        Image.DecompressionBombError,
    ) as error:  # what a bad file makes the decoders raise
        raise _Unreadable(f"is a broken {header.kind} file") from error


def _wrong_size(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    return f"must be of {wanted[0]}x{wanted[1]} pixels, not {found[0]}x{found[1]}"


def _header(data: bytes) -> _Header:
    """The kind and size of the file, by its content."""
    if not data:
        raise _Unreadable("is empty")
    if len(data) > MAX_FILE_BYTES:
        raise _Unreadable(f"must be at most {MAX_FILE_BYTES} bytes, not {len(data)}")
    try:
        if data.startswith(_PNG_SIGNATURE + b"\0\0\0\x0dIHDR"):
            return _Header("PNG", *struct.unpack_from(">II", data, 16))
        if data.startswith(b"\xff\xd8\xff"):
            return _Header("JPEG", *_jpeg_size(data))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _Header("WEBP", *_webp_size(data))
    except (struct.error, IndexError) as error:
        raise _Unreadable("is cut off") from error
    raise _Unreadable("must be a PNG, JPEG or WebP file")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height from the frame header, which comes after segments of any number (ITU T.81, B.1.1 and B.2.2)."""
    position = 2
    for _ in range(_FAR_TOO_MANY_PARTS):
        if data[position] != _JPEG_MARK:
            raise _Unreadable("is a broken JPEG file")
        marker = data[position + 1]
        if marker in _JPEG_SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        if marker == _JPEG_MARK:
            position += 1
        elif marker in _JPEG_BARE_MARKERS:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise _Unreadable("is a JPEG of too many segments")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk (RFC 9649, 2.5 to 2.7)."""
    match data[12:16]:
        case b"VP8X":
            extents = struct.unpack_from("<HBHB", data, 24)
            return 1 + extents[0] + (extents[1] << 16), 1 + extents[2] + (extents[3] << 16)
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    raise _Unreadable("is a broken WebP file")


def _bare_png(data: bytes) -> bytes:
    """The file without texts, profiles and private chunks, some of which are compressed: a small file, a large text."""
    kept = [_PNG_SIGNATURE]
    for kind, chunk in _png_chunks(data):
        if kind == b"acTL":
            raise _Unreadable("is animated; it must be one picture")
        if kind in _PNG_KEPT:
            kept.append(chunk)
    return b"".join(kept)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Chunks with their length and checksum, up to the end of the picture."""
    position, kind = len(_PNG_SIGNATURE), b""
    for _ in range(_FAR_TOO_MANY_PARTS):
        if kind == b"IEND":
            return
        if position + 12 > len(data):
            raise _Unreadable("is cut off")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise _Unreadable("is cut off")
        yield kind, data[position:end]
        position = end
    raise _Unreadable("is a PNG of too many chunks")


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a pixel, which a plain conversion would cut at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        ground = (255, 255, 255, 255) if mode == "RGB" else (0, 0, 0, 255)
        picture = Image.alpha_composite(Image.new("RGBA", over.size, ground), over)
    return picture.convert(mode)
