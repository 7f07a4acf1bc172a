"""Inputs that are no files of this machine: `s3://`, `gs://`, `hf://`, `https://`, ..., through fsspec.

    1. `is_remote(path)`, `open_input(path)`   local or not; either is opened for reading from the start
    2. `list_remote(url, unread)`              an object, a folder, a pattern -> what is there, with sizes and versions
    3. `changed(files)`                        those that are not any more what they were when listed
    4. `RemoteFile`                            reads on after a fault of the network, from the byte where it was
    5. `cat(urls)`                             many small ones at once

Which package speaks to a store is fsspec's matter, and so are credentials (its environment variables and config files);
http and https are read by http_files.py, which needs no package.
"""

import contextlib
import datetime
import glob
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from megatron_encdec.platform.errors import UserError

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
WEB = ("http://", "https://")
BLOCK = 8 << 20  # bytes asked for at once
ATTEMPTS, FIRST_PAUSE = 5, 1.0  # of a read that fails, and seconds before the second one; twice as long each time
LASTING = (FileNotFoundError, PermissionError, ImportError)  # no second attempt helps
AT_ONCE = 16  # requests for small things
# What stores say of an object that changes with its content, best first.
VERSIONS = ("ETag", "etag", "generation", "checksum", "sha256", "blob_id", "md5Hash", "LastModified", "last_modified",
            "Last-Modified", "updated", "mtime", "created")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs",
            "hf": "huggingface_hub"}


class Found(NamedTuple):
    """An object of a store; `version` changes when its content does, as far as the store tells: `ETag=...`."""

    url: str
    size: int
    version: str


def is_remote(path: str) -> bool:
    """Whether it is a URL; a file of such a name that is here goes before."""
    return URL.match(path) is not None and not os.path.lexists(path)


def bare(path: str) -> str:
    """`path`, of the web without query and fragment: its end says what kind of file it is."""
    return re.split(r"[?#]", path, maxsplit=1)[0] if _is_web(path) else path


def _is_web(url: str) -> bool:
    return url.lower().startswith(WEB)


def open_input(path: str, buffering: int = -1):
    """The file or object at `path`, opened to be read as bytes. Raises OSError of a file, `UserError` of an object."""
    return RemoteFile(path) if is_remote(path) else open(path, "rb", buffering=buffering)


def list_remote(url: str, unread: dict[str, str]) -> tuple[list[Found], bool]:
    """What `url` stands for, sorted, and whether it names one object; names that begin with a dot go to `unread`.
    Raises `UserError` where nothing is there, or the store cannot be asked."""
    def look(store, path: str) -> tuple[list[Found], bool]:
        if glob.has_magic(path) and not _is_web(url):
            matches = store.glob(path, detail=True)
            folders = [name for name, info in matches.items() if info["type"] == "directory"]
            found = {name: info for name, info in matches.items() if info["type"] != "directory"}
            for folder in folders:
                found |= store.find(folder, detail=True)
            if not found:
                raise UserError(f"{url}: nothing matches this pattern (input)")
        elif (info := store.info(path))["type"] != "directory":
            return [_found(store, path, info)], True
        else:
            found = store.find(path, detail=True)
        kept = []
        for name, info in sorted(found.items()):
            if name.rpartition("/")[2].startswith("."):
                unread[name] = "hidden (a name that begins with a dot)"
            else:
                kept.append(_found(store, name, info))
        return kept, False

    return _tried(url, look)


def changed(files: Sequence[Found]) -> list[str]:
    """The URLs of those whose size or version is another one now."""
    def look(store, path: str) -> Found:
        store.invalidate_cache()
        return _found(store, path, store.info(path))

    def differs(file: Found) -> bool:
        now = _tried(file.url, look)
        told, then = now.version.partition("=")[0], file.version.partition("=")[0]  # a list may tell less
        return now.size != file.size or told == then and now.version != file.version

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return [file.url for file, other in zip(files, threads.map(differs, files), strict=True) if other]


def cat(urls: Sequence[str]) -> Iterator[bytes]:
    """The content of each object, in order; as many as `AT_ONCE` are asked for ahead."""
    def content(url: str) -> bytes:
        with RemoteFile(url) as file:
            return file.readall()

    with ThreadPoolExecutor(AT_ONCE) as threads:
        yield from threads.map(content, urls)


class RemoteFile(io.RawIOBase):
    """The object at `url`, to be read like an unbuffered file. A read that fails is tried again; then a `UserError`
    says why."""

    def __init__(self, url: str):
        self._url, self._position, self._file = url, 0, None
        self._size = _tried(url, lambda store, path: store.info(path)["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer) -> int:
        data = self._read(len(buffer))
        buffer[:len(data)] = data
        return len(data)

    def read(self, count: int = -1) -> bytes:
        return self.readall() if count is None or count < 0 else self._read(count)

    def _read(self, count: int) -> bytes:
        def work(store, path: str) -> bytes:
            if self._file is None:
                self._file = store.open(path, "rb", block_size=BLOCK, cache_type="readahead")
            if self._file.tell() != self._position:
                self._file.seek(self._position)
            data = self._file.read(count)
            if not data and count and self._position < self._size:
                raise OSError(f"ends after {self._position:,} of {self._size:,} bytes")
            return data

        data = _tried(self._url, work, self._drop)
        self._position += len(data)
        return data

    def _drop(self) -> None:
        file, self._file = self._file, None
        with contextlib.suppress(Exception):
            if file is not None:
                file.close()

    def close(self) -> None:
        self._drop()
        super().close()


def _tried(url: str, work: Callable[[Any, str], Any], drop: Callable[[], None] = lambda: None) -> Any:
    """`work(store, path)` for the store and the path of `url`, again where it fails by what may pass, ATTEMPTS times in
    all, after `drop()`. Raises `UserError`."""
    pause = FIRST_PAUSE
    for attempt in range(ATTEMPTS):
        try:
            return work(*_store(url))
        except UserError:
            raise
        except Exception as error:  # whatever a store or the network does
            drop()
            if attempt == ATTEMPTS - 1 or isinstance(error, LASTING) or _is_unknown(error):
                raise _refusal(url, error) from None
            print(f"note: {url}: {_said(error)}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause *= 2
    raise AssertionError("the last attempt returns or raises")


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and what the URL is called there."""
    import fsspec

    if _is_web(url):
        from megatron_encdec.text.http_files import HttpFiles

        return HttpFiles(), url
    return fsspec.core.url_to_fs(url)


def _found(store, path: str, info: dict) -> Found:
    url = path if _is_web(path) else store.unstrip_protocol(path)
    if info.get("size") is None:
        raise UserError(f"{url}: its server does not say how long it is; download it, and name the file")
    version = next((f"{key}={_plain(info[key])}" for key in VERSIONS if info.get(key) is not None), "")
    return Found(url, int(info["size"]), version)


def _plain(value: Any) -> Any:
    """A time as seconds: lists and single answers write it differently."""
    return value.timestamp() if isinstance(value, datetime.datetime) else value


def _is_unknown(error: Exception) -> bool:
    """Whether fsspec knows no store of that kind."""
    return isinstance(error, ValueError) and "rotocol" in str(error)


def _refusal(url: str, error: Exception) -> UserError:
    scheme = url.partition(":")[0]
    if isinstance(error, ImportError):
        package = PACKAGES.get(scheme, getattr(error, "name", None) or scheme)
        return UserError(f"{url}: reading {scheme}:// needs the package {package}, which is not usable here "
                         f"({_said(error)}); install it: pip install {package}")
    if isinstance(error, FileNotFoundError):
        return UserError(f"{url}: is not there (input); check the name with the tool of that store")
    if _is_unknown(error):
        import fsspec

        known = ", ".join(name for name in ("s3", "gs", "hf", "https", "az", "memory")
                          if name in fsspec.available_protocols())
        return UserError(f"{url}: no store of this kind is known (known: {known}, ...); correct the name")
    return UserError(f"{url}: cannot be read ({_said(error)}); check the name, the credentials and the network; the "
                     "same command goes on where it was")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
