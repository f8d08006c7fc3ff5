"""The store's own files, by URL: `file://`, `http(s)://` or `s3://`, through fsspec.

The rule: every read is bounded in bytes and in time, and goes nowhere else than to the URL: redirects are refused.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import aiohttp
import fsspec

from darkroom.errors import StoreUnavailable
from darkroom.store.header import Malformed

SCHEMES = ("file", "http", "https", "s3")
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 10.0
"""Between one byte and the next."""
_LEAST_BYTES_PER_S = 1 << 20
"""A store that sends less is as good as down."""
_BLOCK_BYTES = 2 << 20


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
        with self._opened(path) as file:
            return b"".join(_blocks(file, limit_bytes, path, deadline_s))

    def stream(self, path: str, size_bytes: int) -> Iterator[bytes]:
        """The file's blocks. Raises FileNotFoundError, StoreUnavailable, or Malformed for another size."""
        deadline_s = time.monotonic() + seconds_for(size_bytes)
        seen = 0
        with self._opened(path) as file:
            for block in _blocks(file, size_bytes + 1, path, deadline_s):
                seen += len(block)
                if seen > size_bytes:
                    break
                yield block
        if seen != size_bytes:
            raise Malformed(f"{path} has {'over ' * (seen > size_bytes)}{min(seen, size_bytes)} bytes of {size_bytes}")

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[BinaryIO]:
        try:
            with self._open(path) as file:
                yield file
        except (FileNotFoundError, StoreUnavailable, Malformed):
            raise
        except Exception as error:  # each protocol's client has errors of its own; whichever it is, there is no file
            raise StoreUnavailable(path, "it does not answer") from error

    def _open(self, path: str) -> Any:
        url = f"{self._base}/{path}"
        if self._is_http:  # given a size, fsspec does not ask for it first; without blocks, it streams
            return self._files.open(url, "rb", block_size=0, size=1, allow_redirects=False)
        return self._files.open(url, "rb")


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
        timeout=timeout, raise_for_status=_refuse_redirect, auto_decompress=False, read_bufsize=_BLOCK_BYTES
    )


async def _refuse_redirect(response: aiohttp.ClientResponse) -> None:
    if 300 <= response.status < 400:  # noqa: PLR2004 - the class of redirects
        raise OSError(f"it redirects, with status {response.status}")
