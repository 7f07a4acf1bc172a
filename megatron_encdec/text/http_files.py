"""Files of the web for fsspec, read in ranges where the server knows them and from the start where it does not.

Python's own client is enough for that (proxies by their environment variables); fsspec's needs aiohttp and event loops.
Nothing is listed: a URL names one file.
"""

import email.message
import http.client
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

SECONDS = 60.0  # without a byte
SKIPPED = 1 << 20  # bytes at once


class HttpFiles(AbstractFileSystem):
    """One file a URL."""

    protocol = ("http", "https")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        """A URL stays one."""
        return path

    def info(self, path: str, **_) -> dict[str, Any]:
        """Its size (None where the server does not say), whether it can be read in ranges, and its version."""
        try:
            with _get(path, "bytes=0-0") as answer:
                ranges, headers = answer.status == 206, answer.headers
        except urllib.error.HTTPError as error:
            if error.code != 416:  # an empty file has no first byte
                raise
            ranges, headers = True, error.headers
        return {"name": path, "type": "file", "size": _size(headers, ranges), "ranges": ranges,
                "ETag": headers.get("ETag"), "Last-Modified": headers.get("Last-Modified")}

    def _open(self, path: str, mode: str = "rb", block_size: int = 0, **options) -> "HttpFile":
        info = self.info(path)
        return HttpFile(self, path, mode, block_size or "default", size=info["size"] or 0, ranges=info["ranges"],
                        cache_type=options.get("cache_type", "readahead"))


class HttpFile(AbstractBufferedFile):
    """A file that is open. ranges: whether the server gives parts; else one answer is read on, and begun again where an
    earlier place is asked for."""

    def __init__(self, *arguments, ranges: bool, **options):
        super().__init__(*arguments, **options)
        self._ranges, self._answer, self._at = ranges, None, 0

    def _fetch_range(self, start: int, end: int) -> bytes:
        if self._ranges:
            data = bytearray()
            while len(data) < end - start:  # an answer that breaks off has brought something all the same
                data += _piece(self.path, start + len(data), end)
            return bytes(data)
        if self._answer is None or start < self._at:
            self._leave()
            self._answer, self._at = _get(self.path), 0
        while self._at < start and (piece := self._answer.read(min(SKIPPED, start - self._at))):
            self._at += len(piece)
        data = self._answer.read(end - start)
        self._at += len(data)
        return data

    def _leave(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def close(self) -> None:
        self._leave()
        super().close()


def _piece(url: str, start: int, end: int) -> bytes:
    """What comes of bytes `start` to `end` - 1 before the answer ends: one at least, or OSError."""
    data = bytearray()
    with _get(url, f"bytes={start}-{end - 1}") as answer:
        whole, sent = answer.status != 206, answer.headers.get("Content-Range", "")
        if not whole and not sent.startswith(f"bytes {start}-"):
            raise OSError(f"asked for byte {start}, and it sent {sent!r}")
        try:
            while piece := answer.read(SKIPPED):
                data += piece
        except (OSError, http.client.HTTPException):
            if not data:
                raise
    if whole:
        data = data[start:end]
    if not data:
        raise OSError(f"no byte came from {start} on")
    return bytes(data)


def _get(url: str, part: str | None = None) -> http.client.HTTPResponse:
    url = urllib.parse.quote(url, safe="%!#$&'()*+,/:;=?@[]~")  # as browsers do: letters beyond ASCII, blanks
    headers = {"Accept-Encoding": "identity", "User-Agent": "megatron-encdec", **({"Range": part} if part else {})}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(url) from None
        if 400 <= error.code < 500 and error.code not in (408, 416, 429):  # what asking again does not change
            raise PermissionError(f"HTTP {error.code}") from None
        raise


def _size(headers: email.message.Message, ranges: bool) -> int | None:
    total = headers.get("Content-Range", "").rpartition("/")[2] if ranges else headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None
