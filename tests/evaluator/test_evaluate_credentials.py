"""Headers and tokens: what is sent, and that no message ever shows a secret."""

from pathlib import Path

import pytest

from evaluator.credentials import headers_of, without_secrets
from evaluator.errors import EvaluateError, NotFoundError, OptionsError, UsageError

SECRET = "s3cret"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVALUATE_TOKEN", raising=False)


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(f"{SECRET}\n")
    return str(path)


def test_headers_are_kept_as_they_are() -> None:
    assert headers_of(["X-Tenant: a team", "x-empty:", "X-Colon:a:b"], None) == {
        "X-Tenant": "a team",
        "x-empty": "",
        "X-Colon": "a:b",
    }
    assert headers_of([], None) == {}


def test_a_token_of_a_file_before_that_of_the_environment(token_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALUATE_TOKEN", " other\n")
    assert headers_of([], None) == {"Authorization": "Bearer other"}
    assert headers_of(["X-A: b"], token_file) == {"X-A": "b", "Authorization": f"Bearer {SECRET}"}
    assert headers_of(["authorization: Basic abc"], None) == {"authorization": "Basic abc"}
    monkeypatch.setenv("EVALUATE_TOKEN", "")
    assert headers_of([], None) == {}


@pytest.mark.parametrize(
    "header",
    [
        SECRET,
        f"Authorization Bearer {SECRET}",
        f": {SECRET}",
        f"A name: {SECRET}",
        f"X-Key: {SECRET}\r\nX-Other: 1",
        f"X-Key: {SECRET} ä",
        f"Host: {SECRET}",
        f"Content-Length: {SECRET}",
        f"grpc-timeout: {SECRET}",
    ],
)
def test_a_header_that_cannot_be_sent_is_wrong_usage(header: str) -> None:
    with pytest.raises(UsageError, match="--header: expected") as raised:
        headers_of(["X-First: 1", header], None)
    hidden(raised)


def test_the_same_thing_twice_is_wrong_usage(token_file: str) -> None:
    with pytest.raises(UsageError, match="x-a is given twice"):
        headers_of(["X-A: 1", "x-a: 2"], None)
    with pytest.raises(UsageError, match="expected one of them, found both") as raised:
        headers_of([f"AUTHORIZATION: {SECRET}"], token_file)
    hidden(raised)


@pytest.mark.parametrize(
    "content", ["", " \n", f"{SECRET}\n{SECRET}", f"Bearer {SECRET}", f"{SECRET}ä", f"{SECRET}\x00"]
)
def test_a_file_without_one_token_is_an_error_of_the_options(content: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(content, "utf-8")
    with pytest.raises(OptionsError, match=r"--token-file.*: expected a token") as raised:
        headers_of([], str(tmp_path / "token"))
    hidden(raised)


def test_a_file_that_is_not_there_or_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="found nothing at"):
        headers_of([], str(tmp_path / "missing"))
    with pytest.raises(OptionsError, match="cannot read"):
        headers_of([], str(tmp_path))


def test_a_variable_without_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALUATE_TOKEN", f"{SECRET} {SECRET}")
    with pytest.raises(OptionsError, match="the variable EVALUATE_TOKEN") as raised:
        headers_of([], None)
    hidden(raised)


def hidden(raised: pytest.ExceptionInfo[EvaluateError]) -> None:
    """The secret is neither in the message nor in what --debug would print of its causes."""
    error: BaseException | None = raised.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__


TOKEN, KEY = "eyJhbGciOi.J9", "k-1234567"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (f"bad token Bearer {TOKEN}, really {TOKEN}", "bad token (not shown), really (not shown)"),
        (f"{{'X-Key': '{KEY}'}}", "{'X-Key': '(not shown)'}"),
        (f"you sent {TOKEN[:-1]}...", "you sent (not shown)"),
        (f"you sent {KEY[:6]}...'", "you sent (not shown)'"),
        ("yes, short ones are words", "yes, short ones are words"),
    ],
)
def test_what_a_server_says_is_told_without_what_it_was_sent(said: str, told: str) -> None:
    assert without_secrets(said, {"Authorization": f"Bearer {TOKEN}", "X-Key": KEY, "X-Short": "yes"}) == told
