"""Google Cloud Storage, both ways, without a copy on this machine.

A folder is a prefix of names: there is none to make and none to clean up. An object is there when its upload is
complete and not before, so a writer needs no temporary name. Requests go through `gcs_client`.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime
from http import HTTPStatus
from typing import Any

import crc32c

from converter.errors import (
    ChangedError,
    IncompleteError,
    OptionsError,
    SourceError,
    SourceMissingError,
    UsageError,
)
from converter.storage import gcs_client
from converter.storage.base import BYTECODE, Buffer, Files, Storage, T
from converter.storage.gcs_client import AGAIN, TIMEOUT, damaged, translated

SCHEME = "gs://"
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
CHUNK = 8 << 20  # bytes of a file that are kept before they are sent, where there is room for so many
UNIT = 256 << 10  # what an upload of several parts consists of
JOBS = 32  # threads: nearly all of their time is waiting for answers
TENSORSTORE_RETRIES = 8  # after 1, 2, 4, ... at most 32 seconds: as patient
APPEND_SECONDS = 3  # between uploads of a journal: an object takes about one a second
DELETING = 16  # threads
BINARY = "application/octet-stream"


class BucketStorage:
    """A folder `gs://bucket/prefix`; names are relative to it and use `/`."""

    block = 8 << 20  # takes as long to arrive as its request waits for an answer, or a few times as long
    kept = CHUNK  # larger files are sent in several requests
    jobs = JOBS  # as many requests under way
    knows_checksums = True

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket, self.prefix = bucket, prefix
        self._stated: dict[str, str] = {}  # what the last listing said of checksums: no request for each of them

    @classmethod
    def of(cls, uri: str) -> BucketStorage:
        """The one that a URI names.

        Raises:
            UsageError: malformed.
            OptionsError: the client library is not installed.
        """
        bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
        prefix = prefix.rstrip("/")
        if not BUCKET.fullmatch(bucket) or (prefix and {"", ".", ".."} & set(prefix.split("/"))):
            raise UsageError(f"{uri}: expected gs://bucket or gs://bucket/folder, without empty or dotted parts")
        try:
            import google.cloud.storage  # noqa: F401 (only whether it is there)
        except ImportError as error:
            raise OptionsError(f"{uri}: buckets need google-cloud-storage: pip install 'ftconvert[gcs]'") from error
        return cls(bucket, prefix)

    def __str__(self) -> str:
        return self.path("")

    @property
    def _root(self) -> str:
        return f"{SCHEME}{self.bucket}"

    @property
    def name(self) -> str:
        """The last part of the prefix; the bucket's name without one."""
        return self.prefix.rpartition("/")[2] or self.bucket

    def _object(self, name: str) -> str:
        """The object's name in the bucket."""
        return "/".join(part for part in (self.prefix, name) if part)

    def _blob(self, name: str) -> Any:
        return gcs_client.client().bucket(self.bucket).blob(self._object(name))

    def path(self, name: str) -> str:
        """Where an object lies."""
        return "/".join(part for part in (self._root, self.prefix, name) if part)

    def below(self, name: str) -> BucketStorage:
        """A folder in this one."""
        return BucketStorage(self.bucket, self._object(name))

    def parent(self) -> BucketStorage | None:
        """The folder this one lies in; None for the bucket itself."""
        return BucketStorage(self.bucket, self.prefix.rpartition("/")[0]) if self.prefix else None

    def contains(self, other: Storage) -> bool:
        """Whether the other is this folder or lies in it."""
        if not isinstance(other, BucketStorage) or other.bucket != self.bucket:
            return False
        return f"{other.prefix}/".startswith(f"{self.prefix}/") or not self.prefix

    def _list(self, folder: str, fields: str, **options: Any) -> Any:
        """What lies below a folder of the bucket, page after page."""
        prefix = f"{folder}/" if folder else None
        return gcs_client.client().list_blobs(
            self.bucket, prefix=prefix, fields=fields, **options, **gcs_client.options()
        )

    def _listed(self) -> dict[str, Any]:
        """Every object below: name -> what is listed. No bytecode, none of the empty ones that stand for folders."""
        skipped = len(self._object("x")) - 1
        with translated(self._root, "no such bucket"):
            listed = self._list(self.prefix, "items(name,size,generation,crc32c),nextPageToken")
            files = (blob for blob in listed if blob.size or not blob.name.endswith("/"))
            found = {blob.name[skipped:]: blob for blob in files if f"/{BYTECODE}/" not in f"/{blob.name[skipped:]}"}
        self._stated = {name: blob.crc32c for name, blob in found.items()}
        return found

    def is_folder(self) -> bool:
        """Whether anything lies below this prefix; a bucket is a folder, empty or not.

        Raises:
            SourceMissingError: there is no such bucket.
        """
        with translated(self._root, "no such bucket"):
            return any(True for _ in self._list(self.prefix, "items(name)", max_results=1)) or not self.prefix

    def files(self) -> Files:
        """Every object below the folder but Python's bytecode, with its generation."""
        return Files((name, blob.size, blob.generation) for name, blob in self._listed().items())

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""
        with translated(self._root, "no such bucket"):
            listed = self._list(self.prefix, "prefixes,nextPageToken", delimiter="/")
            for _ in listed.pages:
                pass
        return sorted(folder.rstrip("/").rpartition("/")[2] for folder in listed.prefixes)

    def is_file(self, name: str) -> bool:
        if not self._object(name):
            return False
        with translated(self.path(name)):
            return bool(self._blob(name).exists(**gcs_client.options()))

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of an object, `size` of them from `start` (all without a size); only these are fetched.

        Raises:
            SourceError: the object ends before that.
            SourceMissingError, OptionsError, IncompleteError: see `translated`.
        """
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        if size == 0:  # no range says that
            return b""
        came, end = _Came(), None if size is None else start + size - 1
        whole = start == 0 and size is None
        with translated(self.path(name)), suppress(RequestRangeNotSatisfiable):
            self._blob(name).download_to_file(
                came,
                start=start or None,
                end=end,
                checksum="crc32c" if whole else None,  # the bucket states none of a part
                single_shot_download=True,  # else in pieces of 8 KiB, each one through the interpreter
                **gcs_client.options(),
            )
        data = came.data
        if size is not None and len(data) != size:
            raise SourceError(f"{self.path(name)}: expected {size} bytes from offset {start}, found {len(data)}")
        return data

    def each(self, work: Callable[[str], T], names: Collection[str]) -> list[T]:
        """Side by side: each of them waits for an answer or two."""
        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(work, names))

    def writer(self, name: str, kept: int | None = None) -> BucketWriter:
        """A new object; it appears when it is committed. It keeps 256 KiB in any case."""
        return BucketWriter(self._blob(name), self.path(name), self.kept if kept is None else kept)

    def write(self, name: str, data: bytes) -> None:
        """A small object, whole or not at all."""
        writer = self.writer(name)
        try:
            writer.write(data)
            writer.commit(durable=True)
        except BaseException:
            writer.abort()
            raise

    def generation(self, name: str) -> str:
        """The bucket's own number of an object."""
        from google.api_core.exceptions import NotFound

        blob = self._blob(name)
        with translated(self.path(name)), suppress(NotFound):
            blob.reload(**gcs_client.options())
        return str(blob.generation or "")

    def replace(self, name: str, data: bytes, generation: str) -> str:
        """`write` with the condition that the bucket itself checks: `if_generation_match`, 0 for no such object.

        A request whose answer was lost is sent again, and then finds its own object there: that is no failure.
        """
        blob, sent = self._blob(name), []

        def send() -> None:
            sent.append(name)
            condition = {"if_generation_match": int(generation or 0)}
            blob.upload_from_string(data, BINARY, checksum="crc32c", timeout=TIMEOUT, retry=None, **condition)

        try:
            with translated(self.path(name), "no such bucket", writing=True):
                gcs_client.retry()(send)()
            return str(blob.generation)
        except ChangedError:
            now = self.generation(name)
            if len(sent) == 1 or not now or self.read(name) != data:
                raise
            return now

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Nothing: a bucket cannot tell whether a process is still alive."""
        return nullcontext()

    def modified(self, name: str) -> datetime:
        """When an object was written."""
        blob = self._blob(name)
        with translated(self.path(name)):
            blob.reload(**gcs_client.options())
        updated: datetime = blob.updated
        return updated

    def appender(self, name: str) -> BucketAppender:
        """Records at the end of an object; a killed process loses those of the last seconds."""
        return BucketAppender(self, name)

    def remove(self, name: str) -> None:
        """An object, or everything below a folder; nothing happens where it is not there."""
        from google.api_core.exceptions import NotFound

        def delete(blob: Any) -> None:
            with suppress(NotFound):
                blob.delete(**gcs_client.options())

        with translated(self.path(name), "no such bucket", writing=True):
            below = list(self._list(self._object(name), "items(name),nextPageToken"))
            with ThreadPoolExecutor(DELETING) as pool:
                list(pool.map(delete, [self._blob(name), *below]))

    def discard(self, name: str) -> None:
        """No object is half-written; whatever has such a name was copied here."""
        self.remove(name)

    def checksum(self, name: str) -> str:
        """crc32c of an object, 8 hex digits, as the bucket states it; nothing is fetched."""
        if name not in self._stated:
            blob = self._blob(name)
            with translated(self.path(name)):
                blob.reload(**gcs_client.options())
            return _hexadecimal(blob.crc32c)
        return _hexadecimal(self._stated[name])

    def kvstore(self, name: str) -> dict[str, Any]:
        """TensorStore's key-value store for a folder below."""
        retries = {"max_retries": TENSORSTORE_RETRIES}
        path = f"{self._object(name)}/"
        return {"driver": "gcs", "bucket": self.bucket, "path": path, "gcs_request_retries": retries}

    def free_bytes(self) -> None:
        """There is no end of it."""
        return


class _Came:
    """What the client writes to: keeps the bytes as they are, which BytesIO would copy."""

    data = b""

    def write(self, data: bytes) -> None:
        self.data = self.data + data if self.data else data


class BucketWriter:
    """Keeps up to `kept` bytes. A file that fits is sent in one request, a longer one as a resumable upload."""

    def __init__(self, blob: Any, where: str, kept: int) -> None:
        self.size = 0
        self._blob, self._where = blob, where
        self._most = max(UNIT, kept // UNIT * UNIT)
        self._buffer = bytearray()  # sent as it is, without another copy; a new one for each request
        self._session = ""  # URL of the resumable upload; it is a key as well and belongs in no message
        self._sent = 0
        self._crc = 0

    def write(self, data: Buffer) -> None:
        """Append bytes (any contiguous buffer of single bytes).

        Raises:
            DestinationError, OptionsError, IncompleteError: see `translated`.
        """
        view = memoryview(data).cast("B")
        self._crc = crc32c.crc32c(view, self._crc)
        self.size += len(view)
        while view:
            if len(self._buffer) == self._most:  # and more follows: this is not the end
                self._send("*")
            part = view[: self._most - len(self._buffer)]
            self._buffer += part
            view = view[len(part) :]

    def commit(self, durable: bool = False) -> str:
        """Make the object; returns its crc32c (8 hex digits). What a bucket has taken is durable.

        Raises:
            IncompleteError: what the bucket holds is not what was sent; the object is removed.
            DestinationError, OptionsError: see `translated`.
        """
        stated = self._send(str(self.size)).get("crc32c")
        ours = f"{self._crc:08x}"
        if _hexadecimal(stated) != ours:
            with translated(self._where, writing=True):
                self._blob.delete(**gcs_client.options())
            raise IncompleteError(damaged(self._where))
        return ours

    def abort(self) -> None:
        """Leave nothing of it: an upload that is not finished is no object."""
        self._buffer = bytearray()
        if self._session:
            with suppress(Exception):  # the bucket forgets it after a week by itself
                gcs_client.client()._http.delete(self._session, timeout=10)

    def _send(self, total: str) -> dict[str, Any]:
        """Send what is kept; with the number of all bytes for `total` it makes the object, and returns what it is."""
        put: Callable[[memoryview, str], dict[str, Any]] = gcs_client.retry()(self._put)
        start, end = self._sent, self._sent + len(self._buffer)
        with translated(self._where, "no such bucket", writing=True), memoryview(self._buffer) as data:
            if total == "*" and not self._session:
                self._session = self._blob.create_resumable_upload_session(BINARY, **gcs_client.options())
            answer = put(data, total)
            while self._sent < end:  # a bucket may take a part only
                answer = put(data[self._sent - start :], total)
        self._buffer = bytearray()
        return answer

    def _put(self, data: memoryview, total: str) -> dict[str, Any]:
        """One request of the upload. Sent once more it does no harm: bytes that are there already are passed over."""
        from google.api_core.exceptions import ServiceUnavailable, from_http_response

        client, end = gcs_client.client(), self._sent + len(data)
        headers = {"Content-Type": BINARY}
        if total == str(end):  # lets the bucket itself refuse what was damaged on its way
            headers["X-Goog-Hash"] = f"crc32c={base64.b64encode(self._crc.to_bytes(4, 'big')).decode()}"
        if self._session:
            headers["Content-Range"] = f"bytes {self._sent}-{end - 1}/{total}"
            answer = client._http.put(self._session, data=data, headers=headers, timeout=TIMEOUT)
        else:
            url = f"{client._connection.get_api_base_url_for_mtls()}/upload/storage/v1{self._blob.bucket.path}/o"
            named = {"uploadType": "media", "name": self._blob.name}
            answer = client._http.post(url, params=named, data=data, headers=headers, timeout=TIMEOUT)
        if answer.status_code in (HTTPStatus.OK, HTTPStatus.CREATED):
            self._sent = end
            stated: dict[str, Any] = answer.json()
            return stated
        if self._session and answer.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            raise IncompleteError(f"{self._where}: the bucket has forgotten the upload half-way. {AGAIN}")
        if answer.status_code != HTTPStatus.PERMANENT_REDIRECT:  # its "go on"
            raise from_http_response(answer)
        taken = int(answer.headers.get("Range", "bytes=0--1").partition("-")[2]) + 1
        if not self._sent < taken <= end or total == str(taken):
            raise ServiceUnavailable("the bucket took nothing")
        self._sent = taken
        return {}


class BucketAppender:
    """Keeps the whole text, and uploads it again at most every `APPEND_SECONDS`: an object cannot grow.

    Each upload is on condition that the object is what was seen last; else it is read again, with others' lines in it.
    """

    def __init__(self, storage: BucketStorage, name: str) -> None:
        self._storage, self._name = storage, name
        self._text, self._generation = b"", ""
        self._waiting: list[bytes] = []
        self._look()
        self._at = time.monotonic()

    def append(self, data: bytes) -> None:
        """Whole lines."""
        self._waiting += data.splitlines(keepends=True)
        if time.monotonic() >= self._at + APPEND_SECONDS:
            self._upload()

    def close(self) -> None:
        self._upload()

    def _look(self) -> None:
        """What is there now; of our lines those wait that are not."""
        gone = ChangedError(f"{self._storage.path(self._name)}: somebody has removed it, or begun it anew")
        generation = self._storage.generation(self._name)
        try:
            text = self._storage.read(self._name)
        except SourceMissingError as error:
            raise gone from error
        if self._text and text.partition(b"\n")[0] != self._text.partition(b"\n")[0]:
            raise gone
        there = set(text.splitlines(keepends=True))
        self._generation = generation
        self._text = text if text.endswith(b"\n") else text + b"\n"
        self._waiting = [line for line in self._waiting if line not in there]

    def _upload(self) -> None:
        while self._waiting:
            text = self._text + b"".join(self._waiting)
            try:
                self._generation = self._storage.replace(self._name, text, self._generation)
            except ChangedError:
                self._look()
                continue
            self._text, self._waiting = text, []
            self._at = time.monotonic()


def _hexadecimal(crc: str | None) -> str:
    """The API's crc32c, base64 of four bytes, in 8 hex digits; empty where it states none."""
    return base64.b64decode(crc or "").hex()
