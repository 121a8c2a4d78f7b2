"""The client of Google Cloud Storage, and what it raises as errors of this project.

Every request is tried again for a while by the client library's own rules; what it raises after that becomes this
project's errors in one place, `translated`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http import HTTPStatus
from typing import Any

from converter.errors import (
    ChangedError,
    DestinationError,
    FtconvertError,
    IncompleteError,
    OptionsError,
    SourceError,
    SourceMissingError,
)

TIMEOUT = 60  # seconds that a request may stand still
PATIENCE = 120  # seconds in which a request is tried again
CONNECTIONS = 256  # kept open; more of them than threads, or the client complains about each
AGAIN = "Run the same command again; it goes on where it stopped."
LOG_IN = (
    "Log in with `gcloud auth application-default login`, or name a service account's key file in "
    "GOOGLE_APPLICATION_CREDENTIALS; on GKE give the pod a service account with Workload Identity."
)


@cache
def client() -> Any:
    """One client, so one pool of connections, for all threads; anonymous where STORAGE_EMULATOR_HOST is set."""
    from google.cloud import storage
    from requests.adapters import HTTPAdapter

    made = storage.Client(project=None)  # a project is for those who create buckets
    for scheme in ("http://", "https://"):
        made._http.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS))
    return made


def retry() -> Any:
    """The library's rules: 408, 429, 5xx, lost connections and timeouts, after 1, 2, 4, ... seconds."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(PATIENCE)


def options() -> dict[str, Any]:
    """For every request of the client."""
    return {"retry": retry(), "timeout": TIMEOUT}


# ------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def translated(where: str, missing: str = "no such object", writing: bool = False) -> Iterator[None]:
    """What the client raises becomes what this project raises. No message quotes a URL: some of them are keys.

    Args:
        where: bucket or object.
        missing: what the answer 404 means here.

    Raises:
        SourceMissingError, SourceError: there is nothing to read, or it may not be read.
        DestinationError: there is nothing to write to, or it may not be written.
        OptionsError: no credentials, or none that are accepted.
        IncompleteError: the connection, or the bucket's own trouble, for longer than `PATIENCE`.
    """
    from http.client import HTTPException

    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    try:
        yield
    except DataCorruption as error:
        raise IncompleteError(damaged(where)) from error
    except (GoogleAPIError, InvalidResponse) as error:
        raise _refused(error, where, missing, writing) from error
    except GoogleAuthError as error:
        raise _stranger(error, where) from error
    except (
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        HTTPException,
        ConnectionError,
    ) as error:
        raise _lost(type(error).__name__, where) from error


def _refused(error: Exception, where: str, missing: str, writing: bool) -> FtconvertError:
    """For an answer that is no success."""
    from google.auth.exceptions import GoogleAuthError

    last = getattr(error, "cause", None) or error  # what the retries ended with
    if isinstance(last, GoogleAuthError):
        return _stranger(last, where)
    code = getattr(last, "code", None) or getattr(getattr(last, "response", None), "status_code", None)
    if not code:
        return _lost(type(last).__name__, where)
    said = _said(last)
    answer = f"{int(code)} {HTTPStatus(code).phrase}{said}"
    if code == HTTPStatus.BAD_REQUEST and "crc32c" in said.lower():
        return IncompleteError(damaged(where))
    if code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _lost(answer, where)
    if code == HTTPStatus.PRECONDITION_FAILED:
        return ChangedError(f"{where}: somebody else has written it meanwhile")
    if code == HTTPStatus.UNAUTHORIZED:
        return OptionsError(f"{where}: the bucket does not accept these credentials ({answer}). {LOG_IN}")
    if code == HTTPStatus.FORBIDDEN and writing:
        return DestinationError(
            f"{where}: may not be written ({answer}). Give this account roles/storage.objectAdmin on the bucket."
        )
    if code == HTTPStatus.FORBIDDEN:
        return SourceMissingError(
            f"{where}: may not be read ({answer}). Give this account roles/storage.objectViewer on the bucket, "
            "or roles/storage.objectAdmin to write there, too."
        )
    if code == HTTPStatus.NOT_FOUND:
        kind = DestinationError if writing else SourceMissingError
        return kind(f"{where}: {missing}. Check the name{', or create the bucket' if writing else ''}.")
    return (DestinationError if writing else SourceError)(f"{where}: the bucket answers {answer}")


def _said(error: Exception) -> str:
    """The bucket's own words, if it has any that may be shown: a sentence, in JSON or as it is."""
    try:
        text: str = error.response.text  # type: ignore[attr-defined] # not all have one: AttributeError
        with suppress(ValueError):
            text = json.loads(text)["error"]["message"]
        return f": {text}" if text and len(text) < 500 and not re.search(r"[<\n]|://", text) else ""
    except (AttributeError, LookupError, TypeError, OSError):  # no answer, or none that says anything
        return ""


def _stranger(error: Exception, where: str) -> FtconvertError:
    """For credentials that are not there or not good, and for where they could not be asked for."""
    from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError

    if isinstance(error, TransportError) or (isinstance(error, RefreshError) and error.retryable):
        return _lost(type(error).__name__, where)
    what = str(error).splitlines()[0] if isinstance(error, DefaultCredentialsError) else type(error).__name__
    return OptionsError(f"{where}: no credentials for this bucket ({what}). {LOG_IN}")


def _lost(what: str, where: str) -> IncompleteError:
    return IncompleteError(f"{where}: no success in {PATIENCE} s of trying; the last was: {what}. {AGAIN}")


def damaged(where: str) -> str:
    """What is said of an object that is not what was sent, or stored."""
    return f"{where}: damaged on its way: the bucket states another checksum. {AGAIN}"
