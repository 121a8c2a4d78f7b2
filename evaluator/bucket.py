"""Files in a bucket (gs://bucket/object): read, written, listed; every failure is one of evaluator.errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evaluator.errors import EvaluateError, NotFoundError, OptionsError, TransientError, UsageError, cannot_import

SCHEME = "gs://"
NAME = re.compile(r"([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])/(.+)")
PATIENCE = 120  # seconds in which a request is tried again
LOG_IN = "gcloud auth application-default login, or a key file's name in GOOGLE_APPLICATION_CREDENTIALS"


def is_one(path: str) -> bool:
    """Whether a path lies in a bucket."""
    return path.startswith(SCHEME)


def read(uri: str, option: str, mend: str) -> bytes:
    """A whole object. `option` and `mend` are for the message when it is not there.

    Raises:
        UsageError: malformed.
        NotFoundError: it is not there, or may not be read.
        TransientError: a connection that failed.
        OptionsError: no credentials, or the package is not installed.
    """
    with _opened(uri, option, "expected an object at", mend) as (client, name, path, retry):
        return bytes(client.bucket(name).blob(path).download_as_bytes(retry=retry))


def write(uri: str, content: bytes, option: str) -> None:
    """Put an object there, whole; the bucket compares its checksum. Raises as `read`."""
    mend = "give a bucket that there is and that this account may write to (roles/storage.objectUser)"
    with _opened(uri, option, "cannot write", mend) as (client, name, path, retry):
        client.bucket(name).blob(path).upload_from_string(content, checksum="crc32c", retry=retry)


def names(uri: str, option: str) -> list[str]:
    """Of the objects directly below a folder. Raises as `read`."""
    mend = "give a bucket that there is and that this account may read (roles/storage.objectUser)"
    with _opened(uri.rstrip("/") + "/", option, "cannot list", mend) as (client, name, path, retry):
        return [blob.name[len(path) :] for blob in client.list_blobs(name, prefix=path, delimiter="/", retry=retry)]


@contextmanager
def _opened(uri: str, option: str, doing: str, mend: str) -> Iterator[tuple[Any, str, str, Any]]:
    """A client, the bucket's name, the object's, and how often to try again."""
    match = NAME.fullmatch(uri.removeprefix(SCHEME))
    if not match:
        raise UsageError(f"{option}: expected gs://bucket/object, found {uri}")
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        from google.cloud.storage.retry import DEFAULT_RETRY
    except ImportError as error:
        raise cannot_import("google-cloud-storage", uri, error, extra="gcs") from error
    try:
        client = storage.Client(project=None)  # a project is for those who create buckets
        yield client, match[1], match[2], DEFAULT_RETRY.with_timeout(PATIENCE)
    except DataCorruption as error:
        raise TransientError(f"{option}: {uri} arrived damaged\n  mend: run the command again") from error
    except (GoogleAPIError, GoogleAuthError, InvalidResponse, OSError) as error:  # requests' own are OSErrors
        raise _failure(error, f"{option}: {doing} {uri}", mend) from error


def _failure(error: Exception, expected: str, mend: str) -> EvaluateError:
    from google.auth.exceptions import GoogleAuthError

    last = getattr(error, "cause", None) or error  # what the retries ended with
    code = getattr(last, "code", None) or getattr(getattr(last, "response", None), "status_code", None)
    if isinstance(last, GoogleAuthError) or code == 401:
        return OptionsError(f"{expected}, found no credentials that the bucket accepts\n  mend: {LOG_IN}")
    if code == 404:
        return NotFoundError(f"{expected}, found none (404)\n  mend: {mend}")
    if code == 403:
        return NotFoundError(f"{expected}, found it forbidden (403)\n  mend: {mend}")
    found = f"{int(code)}" if code else type(last).__name__
    return TransientError(f"{expected}, found the bucket out of reach ({found})\n  mend: run the command again")
