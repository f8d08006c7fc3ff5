"""The store's own files, by URL: `file://`, `http(s)://` or `s3://`, through fsspec.

The rule: every read is bounded in bytes and in time, and goes nowhere else than to the URL: redirects are refused.
What has come is not asked for again: a connection that breaks is made anew where it broke.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import aiohttp
import blake3
import fsspec

from darkroom.errors import StoreUnavailable
from darkroom.store.header import Malformed
from darkroom.store.manifest import FileEntry

SCHEMES = ("file", "http", "https", "s3")
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 10.0
"""Between one byte and the next."""
_LEAST_BYTES_PER_S = 1 << 20
"""A store that sends less is as good as down."""
_BLOCK_BYTES = 2 << 20
_PAUSES_S = (0.1, 0.4, 1.5)
"""Before a connection that broke is made anew, if nothing has come since the last."""
_RANGE = re.compile(r"bytes (\d+)-")


class Torn(Exception):
    """What came in several answers is not the file: the store has changed it meanwhile, or what came first is wrong."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What is here already of a file: its first bytes, hashed."""

    size_bytes: int = 0
    hasher: Any = field(default_factory=blake3.blake3)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server sends, and which of the file's bytes is the first: not the one asked for, if it knows no ranges."""

    file: BinaryIO
    start: int


def check_url(url: str) -> str:
    """The URL. Raises ValueError unless it can be one of a store."""
    parts = urlsplit(url)
    has_host = bool(parts.netloc) or parts.scheme == "file"
    if parts.scheme not in SCHEMES or not has_host or parts.query or parts.fragment:
        raise ValueError(f"model_store must be a folder, or a URL of {', '.join(SCHEMES)}, not {url!r}")
    return url


class Remote:
    """A store that files are fetched from. Its methods block, and may be called from any thread."""

    def __init__(self, url: str) -> None:
        """`url` as `check_url` gives it. Connects to nothing yet."""
        self._base = url.rstrip("/")
        scheme = urlsplit(url).scheme
        self._files: Any = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme))
        self._is_http = scheme in ("http", "https")

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The file, or its first `limit_bytes`. Raises FileNotFoundError, or StoreUnavailable."""
        deadline_s = time.monotonic() + seconds_for(limit_bytes)
        with self._opened(path) as answer:
            return b"".join(_blocks(answer.file, limit_bytes, path, deadline_s))

    def stream(self, path: str, entry: FileEntry, begun: Begun | None = None) -> Iterator[bytes]:
        """The file's blocks after what is here already; when there are no more of them, it is the entry's file.

        Raises FileNotFoundError, StoreUnavailable, Torn, or Malformed for a file that is another.
        """
        begun = begun or Begun()
        starts = [begun.size_bytes]
        try:
            for block in self._pieces(path, entry.size_bytes, starts):
                begun.hasher.update(block)
                yield block
            _check_digest(begun, entry)
        except Malformed as problem:
            if any(starts):
                raise Torn("what it sent at several times is not one file") from problem
            raise

    def _pieces(self, path: str, size_bytes: int, starts: list[int]) -> Iterator[bytes]:
        """The file's blocks from the only start on. Notes where each answer after the first had to start."""
        deadline_s = time.monotonic() + seconds_for(size_bytes)
        seen = starts[0]
        pauses: Iterator[float] = iter(())  # a store that sends nothing at first is down
        while True:
            try:
                for block in self._rest(path, size_bytes, seen, deadline_s):
                    seen += len(block)
                    yield block
            except StoreUnavailable:
                pauses = iter(_PAUSES_S) if seen > starts[-1] else pauses
                pause_s = next(pauses, None)
                if pause_s is None or time.monotonic() + pause_s > deadline_s:
                    raise
            else:
                return
            time.sleep(pause_s)
            starts.append(seen)

    def _rest(self, path: str, size_bytes: int, start: int, deadline_s: float) -> Iterator[bytes]:
        """The file's blocks from a byte on, in one answer."""
        if 0 < size_bytes == start:
            return
        with self._opened(path, start) as answer:
            at = answer.start
            for block in _blocks(answer.file, size_bytes + 1 - at, path, deadline_s):
                known = max(start - at, 0)
                at += len(block)
                if at > size_bytes:
                    break
                if known < len(block):
                    yield block[known:]
        if at != size_bytes:
            raise Malformed(f"{path} has {'over ' * (at > size_bytes)}{min(at, size_bytes)} bytes of {size_bytes}")

    @contextlib.contextmanager
    def _opened(self, path: str, start: int = 0) -> Iterator[_Answer]:
        try:
            with self._open(path, start) as file:
                yield _Answer(file, _start_of(file.r, start) if self._is_http else start)
        except (FileNotFoundError, StoreUnavailable, Malformed):
            raise
        except Exception as error:  # each protocol's client has errors of its own; whichever it is, there is no file
            raise StoreUnavailable(path, "it does not answer") from error

    def _open(self, path: str, start: int) -> Any:
        url = f"{self._base}/{path}"
        if self._is_http:  # given a size, fsspec does not ask for it first; without blocks, it streams
            headers = {"Range": f"bytes={start}-"} if start else {}
            return self._files.open(url, "rb", block_size=0, size=1, allow_redirects=False, headers=headers)
        file = self._files.open(url, "rb")
        file.seek(start)
        return file


def _check_digest(whole: Begun, entry: FileEntry) -> None:
    if whole.hasher.hexdigest() != entry.digest:
        raise Malformed("what the store sent has not the digest that its manifest names")


def _start_of(response: aiohttp.ClientResponse, asked: int) -> int:
    """The first byte that it sends. Raises OSError if that is neither the first of all nor the one asked for."""
    if response.status != 206:  # noqa: PLR2004 - partial content
        return 0
    found = _RANGE.match(response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != asked:
        raise OSError("it answers with another range than was asked for")
    return asked


def _blocks(file: BinaryIO, limit_bytes: int, path: str, deadline_s: float) -> Iterator[bytes]:
    while limit_bytes > 0 and (block := file.read(min(_BLOCK_BYTES, limit_bytes))):
        limit_bytes -= len(block)
        yield block
        if time.monotonic() > deadline_s:
            raise StoreUnavailable(path, "it answers too slowly")


def seconds_for(size_bytes: int) -> float:
    """How long that many bytes may take: bounds every wait for a fetch."""
    return _CONNECT_TIMEOUT_S + _READ_TIMEOUT_S + size_bytes / _LEAST_BYTES_PER_S


def _options(scheme: str) -> dict[str, Any]:
    if scheme in ("http", "https"):
        return {"get_client": _http_client}
    if scheme == "s3":
        config = {
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "retries": {"max_attempts": 2},
        }
        return {"config_kwargs": config, "use_listings_cache": False}
    return {}


async def _http_client(**_: Any) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
    return aiohttp.ClientSession(
        timeout=timeout, raise_for_status=_check_status, auto_decompress=False, read_bufsize=_BLOCK_BYTES
    )


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if 300 <= response.status < 400:  # noqa: PLR2004 - the class of redirects
        raise OSError(f"it redirects, with status {response.status}")
    if response.status == 416:  # noqa: PLR2004 - range not satisfiable
        raise Malformed("it has fewer bytes than came before")
