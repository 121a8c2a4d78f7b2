"""Buckets in trouble: what a user is told, with which exit code."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_proxy import UNIT, Proxy
from conftest import refused

from converter.errors import (
    DestinationError,
    FtconvertError,
    IncompleteError,
    OptionsError,
    SourceMissingError,
)
from converter.storage import Storage, gcs_client, open_storage

pytestmark = pytest.mark.usefixtures("impatient")

# -------------------------------------------------------------------------------------------------------------- errors

READS: dict[str, Callable[[Storage], Any]] = {
    "read": lambda storage: storage.read("x", 0, 1),
    "files": lambda storage: storage.files(),
    "folders": lambda storage: storage.folders(),
    "is_folder": lambda storage: storage.is_folder(),
    "is_file": lambda storage: storage.is_file("x"),
    "checksum": lambda storage: storage.checksum("x"),
}
WRITES: dict[str, Callable[[Storage], Any]] = {
    "write": lambda storage: storage.write("x", b"1"),
    "upload": lambda storage: storage.write("x", bytes(UNIT + 1)),
    "remove": lambda storage: storage.remove("x"),
    "append": lambda storage: appended(storage),
}


def appended(storage: Storage) -> None:
    appender = storage.appender("x")
    appender.append(b"1")
    appender.close()


def clear_message(error: FtconvertError, bucket: str) -> str:
    """One message that says where, and quotes no URL."""
    message = str(error)
    assert bucket in message
    assert not re.search(r"https?://|upload_id|uploadType|Traceback|127\.0\.0\.1", message), message
    return message


@pytest.mark.parametrize("action", [*READS, *WRITES])
@pytest.mark.parametrize("trouble", [401, 403, 429, 503, "lost"])
def test_errors(bucket: str, proxy: Proxy, hopeless: None, small_chunks: None, action: str, trouble: Any) -> None:
    storage = open_storage(f"{bucket}/a")
    storage.write("x", b"1")
    proxy.rule = lambda exchange: trouble
    if action == "append":  # the part of it that writes
        proxy.rule = lambda exchange: trouble if exchange.sends else None
    expected: dict[Any, type[FtconvertError]] = {
        401: OptionsError,
        403: SourceMissingError if action in READS else DestinationError,
    }
    with pytest.raises(FtconvertError) as caught:
        (READS | WRITES)[action](storage)
    assert type(caught.value) is expected.get(trouble, IncompleteError)
    message = clear_message(caught.value, bucket)
    hint = {401: "gcloud auth application-default login", 403: "roles/storage.object"}
    assert hint.get(trouble, "Run the same command again") in message
    if trouble == 403:
        assert ("objectViewer" if action in READS else "objectAdmin") in message
        assert "says who" in message


@pytest.mark.parametrize("action", ["files", "folders", "is_folder", "read", "checksum", "write", "upload", "remove"])
def test_a_bucket_that_is_not_there(bucket: str, small_chunks: None, action: str) -> None:
    storage = open_storage("gs://no-such-bucket/a")
    with pytest.raises(SourceMissingError if action in READS else DestinationError) as caught:
        (READS | WRITES)[action](storage)
    assert "no such" in clear_message(caught.value, "gs://no-such-bucket")


def refusal(code: int, text: str) -> Exception:
    """What the library raises for such an answer."""
    import requests
    from google.api_core.exceptions import from_http_response

    answer = requests.Response()
    answer.status_code, answer._content = code, text.encode()
    answer.request = requests.Request("PUT", "https://storage.example/upload?upload_id=secret").prepare()
    return from_http_response(answer)


def troubles() -> Iterator[tuple[Exception, type[FtconvertError], str]]:
    """What a server on this machine does not bring about: raised, expected class, words of the message."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import RefreshError, TransportError

    crc = json.dumps({"error": {"message": 'Provided CRC32C "a" doesn\'t match calculated CRC32C "b".'}})
    yield refusal(400, crc), IncompleteError, "damaged on its way"
    yield refusal(400, "Bucket is a requester pays bucket."), DestinationError, "400 Bad Request: Bucket is a requester"
    yield refusal(401, "Invalid Credentials"), OptionsError, "(401 Unauthorized: Invalid Credentials)"
    yield refusal(403, "see https://storage.example/?upload_id=secret"), DestinationError, "(403 Forbidden)"
    yield refusal(404, ""), DestinationError, "no such bucket"
    yield refusal(502, "<html>"), IncompleteError, "502 Bad Gateway. Run"
    yield (
        exceptions.RetryError("secret", refusal(429, "slow down")),
        IncompleteError,
        "429 Too Many Requests: slow down",
    )
    yield exceptions.RetryError("secret", ConnectionResetError("secret")), IncompleteError, "ConnectionResetError"
    yield exceptions.RetryError("secret", RefreshError("secret")), OptionsError, "RefreshError"
    yield requests.ReadTimeout("secret"), IncompleteError, "ReadTimeout"
    yield ConnectionResetError("secret"), IncompleteError, "ConnectionResetError"
    yield http.client.IncompleteRead(b"secret"), IncompleteError, "IncompleteRead"
    yield TransportError("secret"), IncompleteError, "TransportError"
    yield RefreshError("secret", retryable=True), IncompleteError, "RefreshError"
    yield RefreshError("secret"), OptionsError, "Workload Identity"


@pytest.mark.parametrize(
    "trouble", list(troubles()), ids=lambda trouble: f"{type(trouble[0]).__name__}-{trouble[2][:20]}"
)
def test_errors_of_the_real_thing(trouble: tuple[Exception, type[FtconvertError], str]) -> None:
    raised, expected, words = trouble
    with (
        pytest.raises(FtconvertError) as caught,
        gcs_client.translated("gs://bucket/x", "no such bucket", writing=True),
    ):
        raise raised
    assert type(caught.value) is expected
    message = clear_message(caught.value, "gs://bucket/x")
    assert words in message
    assert "secret" not in message


@pytest.fixture
def real_google(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No emulator: the client would speak with Google, if it had credentials. Nothing is sent."""
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    gcs_client.client.cache_clear()
    yield monkeypatch
    gcs_client.client.cache_clear()


def test_no_credentials(real_google: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_google.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    message = refused(78, "inspect", "gs://bucket/model")
    assert "key.json" in message
    assert "gcloud auth application-default login" in message
    assert "Workload Identity" in message


def test_credentials_that_are_refused(real_google: pytest.MonkeyPatch) -> None:
    from google.auth import credentials, exceptions

    class Expired(credentials.Credentials):
        def refresh(self, request: object) -> None:
            raise exceptions.RefreshError("invalid_grant", {"access_token": "secret"})

    real_google.setattr("google.auth.default", lambda *arguments, **options: (Expired(), None))
    message = refused(78, "inspect", "gs://bucket/model")
    assert "RefreshError" in message
    assert "secret" not in message


def test_no_project_is_needed_and_the_pool_is_large(real_google: pytest.MonkeyPatch) -> None:
    from google.auth.credentials import AnonymousCredentials

    real_google.setattr("google.auth.default", lambda *arguments, **options: (AnonymousCredentials(), None))
    client = gcs_client.client()
    assert client.project is None
    assert client._http.get_adapter("https://storage.googleapis.com")._pool_maxsize >= 256
    assert gcs_client.client() is client


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    assert "pip install 'ftconvert[gcs]'" in refused(78, "inspect", "gs://bucket/model")
    assert str(open_storage(str(tmp_path))) == str(tmp_path)
