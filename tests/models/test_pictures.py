"""Received image files: good ones are read as they look, all others are refused by name, and at once."""

import contextlib
import io
import random
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from darkroom.errors import InvalidField
from darkroom.models.pictures import decode_picture
from darkroom.wire.conditions import MAX_FILE_BYTES

WIDTH, HEIGHT = 48, 32
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
FORMATS = ("PNG", "JPEG", "WEBP")
AT_ONCE_S = 0.1


def file(picture: Image.Image = PICTURE, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, format=kind, **options)
    return data.getvalue()


def decoded(data: bytes, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Any:
    return np.asarray(decode_picture("image", data, size, mode))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


ROWS = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PIXELS))


@pytest.mark.parametrize(
    "data",
    [
        file(),
        file(optimize=True),
        file(kind="WEBP", lossless=True),
        file(kind="WEBP", lossless=True, exif=Image.Exif()),
        png(WIDTH, HEIGHT, ROWS),
    ],
)
def test_files_that_lose_nothing_are_read_exactly(data: bytes) -> None:
    assert (decoded(data) == PIXELS).all()


@pytest.mark.parametrize(("kind", "progressive"), [("JPEG", False), ("JPEG", True), ("WEBP", False)])
def test_files_that_lose_something_are_read_as_they_look(kind: str, progressive: bool) -> None:  # noqa: FBT001
    smooth = PICTURE.resize((6, 4)).resize((WIDTH, HEIGHT))
    found = decoded(file(smooth, kind, quality=95, progressive=progressive))
    assert np.abs(found.astype(int) - np.asarray(smooth)).mean() <= 5


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_all_kinds_of_colours_are_converted(kind: str, mode: str) -> None:
    grey = PICTURE.convert("L")
    match mode:
        case "I;16":
            picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        case "1":
            picture = grey.convert("1")
        case _:
            picture = PICTURE.convert(mode)
    try:
        data = file(picture, kind, **({"quality": 100} if kind == "JPEG" else {"lossless": True}))
    except OSError:
        pytest.skip("no such file can be")
    if mode == "I;16" and kind != "PNG":
        pytest.skip("no such file can be")
    if mode == "I;16":
        right: Any = np.asarray(grey.convert("RGB"))
    else:
        right = np.asarray(picture.convert("RGB"))
    difference = np.abs(decoded(data).astype(int) - right)
    assert difference.mean() <= (20 if kind == "JPEG" and mode == "CMYK" else 2)
    assert decoded(data, "L").shape == (HEIGHT, WIDTH)


def test_what_is_transparent_shows_white_and_is_black_in_a_mask() -> None:
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (200, 0, 0, 0))
    clear.paste((10, 20, 30, 255), (0, 0, WIDTH // 2, HEIGHT))
    for data in (file(clear), file(clear, "WEBP", lossless=True, exact=True)):
        found = decoded(data)
        assert (found[:, : WIDTH // 2] == (10, 20, 30)).all()
        assert (found[:, WIDTH // 2 :] == 255).all()
        assert (decoded(data, "L")[:, WIDTH // 2 :] == 0).all()
    palette = Image.new("P", (WIDTH, HEIGHT), 0)
    palette.putpalette([7, 8, 9])
    assert (decoded(file(palette, transparency=0)) == 255).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_is_turned_as_its_exif_says(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    lying = PICTURE.transpose(Image.Transpose.ROTATE_90)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0}
    data = file(lying, kind, exif=exif, **options)
    assert np.abs(decoded(data).astype(int) - PIXELS).mean() <= 2
    with pytest.raises(InvalidField, match="48x32"):
        decoded(file(lying, kind))


def test_what_darkroom_writes_can_be_read_again() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "x" * 64_000)
    texts.add_itxt("prompt", "€" * 64_000, zip=True)
    assert (decoded(file(pnginfo=texts)) == PIXELS).all()


def webp_canvas(width: int, height: int) -> bytes:
    extents = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + extents
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_many_scans() -> bytes:
    data = file(PICTURE, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * 5000 + b"\xff\xd9"


def animated(kind: str) -> bytes:
    return file(PICTURE, kind, save_all=True, append_images=[PICTURE.transpose(Image.Transpose.ROTATE_180)])


HUGE_ROWS = zlib.compress(bytes(64 << 20), 9)
BAD = {
    "nothing": b"",
    "text": b"a picture of a cat, said to be a PNG",
    "text after the signature": b"\x89PNG\r\n\x1a\n" + b"IHDR" * 20,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='48' height='32'/>",
    "gif": file(PICTURE, "GIF"),
    "bmp": file(PICTURE, "BMP"),
    "tiff": file(PICTURE, "TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n",
    "too many bytes": file() + bytes(MAX_FILE_BYTES),
    "one pixel": file(PICTURE.resize((1, 1))),
    "no pixel": png(0, 0, ROWS),
    "one column more": file(PICTURE.resize((WIDTH + 1, HEIGHT))),
    "bomb by its header": png(1 << 31, 1 << 31, ROWS),
    "bomb of just too many pixels": png(9_000, 9_000, HUGE_ROWS),
    "webp bomb": webp_canvas(1 << 24, 1 << 24),
    "webp without frames": webp_canvas(WIDTH, HEIGHT),
    "webp of another sort": b"RIFF\x20\0\0\0WEBPJUNK" + bytes(40),
    "jpeg bomb": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff" + bytes(60),
    "jpeg of many scans": jpeg_of_many_scans(),
    "jpeg without a frame": b"\xff\xd8" + b"\xff\xe0\0\x02" * 1_000_000,
    "jpeg of segments without length": b"\xff\xd8" + b"\xff\xe0\0\0" * 1000,
    "png of too many chunks": png(WIDTH, HEIGHT, ROWS, chunk(b"teXt", b"") * 200_000),
    "png of too few rows": png(WIDTH, HEIGHT, zlib.compress(bytes(100))),
    "png of no rows": png(WIDTH, HEIGHT, b""),
    "png of rows that are not packed": png(WIDTH, HEIGHT, bytes(500)),
    "png of 16 layers": file().replace(b"\x08\x02\0\0\0", b"\x10\x07\0\0\0", 1),
    "png of a wrong checksum": file()[:29] + b"\0\0\0\0" + file()[33:],
    "chunk as long as can be": file()[:33] + b"\xff\xff\xff\xffIDAT" + file()[41:],
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    **{f"{kind} cut at {at}": file(PICTURE, kind)[:at] for kind in FORMATS for at in (4, 20, 30, 400, -9)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name_and_at_once(name: str) -> None:
    start_s = time.perf_counter()
    with pytest.raises(InvalidField) as caught:
        decoded(BAD[name])
    assert time.perf_counter() - start_s < AT_ONCE_S
    assert caught.value.facts["field"] == "image"
    assert len(caught.value.message) < 200


def test_compressed_texts_are_never_unpacked() -> None:
    bombs = [chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20), 9))] * 60
    profile = chunk(b"iCCP", b"p\0\0" + HUGE_ROWS)
    start_s = time.perf_counter()
    assert (decoded(png(WIDTH, HEIGHT, ROWS, profile, *bombs)) == PIXELS).all()
    assert time.perf_counter() - start_s < AT_ONCE_S


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_with_broken_bytes_is_a_picture_or_refused(kind: str) -> None:
    good, dice = file(PICTURE, kind), random.Random(0)
    for _ in range(400):
        data = bytearray(good)
        for _ in range(dice.randint(1, 6)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        with contextlib.suppress(InvalidField):
            assert decoded(bytes(data)).shape == (HEIGHT, WIDTH, 3)
