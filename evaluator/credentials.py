"""What a request carries besides its body: headers, and the bearer token from a file or the environment.

No message holds a value: any of them may be the secret. Neither does what a server says, where it repeats them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluator.errors import NotFoundError, OptionsError, UsageError

TOKEN_VARIABLE = "EVALUATE_TOKEN"
NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, token
VALUE = re.compile(r"[\x20-\x7e]*")  # of what RFC 9110 allows the part that gRPC takes as well
SHORTEST = 6  # characters of a value that is looked for: shorter ones are words of any message
NOT_SHOWN = "(not shown)"
# What the client writes itself, because it depends on the request or the connection.
RESERVED = ("connection", "content-encoding", "content-length", "content-type", "te", "transfer-encoding")


def headers_of(headers: Sequence[str], token_file: str | None) -> dict[str, str]:
    """What every request carries.

    A token is sent as `Authorization: Bearer TOKEN`: that of the file, else that of the variable EVALUATE_TOKEN. The
    variable counts as nothing where a header says how to authorise.

    Args:
        headers: `Name: value` each, as the command line has them.
        token_file: a file with nothing but the token.

    Raises:
        UsageError: a header is malformed, reserved or given twice, or there is both a header and a file to authorise.
        NotFoundError: there is no such file.
        OptionsError: the file or the variable holds no token, or more than one line.
    """
    found: dict[str, str] = {}
    for number, header in enumerate(headers, start=1):
        name, value = _header(header, number)
        if name.lower() in {known.lower() for known in found}:
            raise UsageError(f"--header: {name} is given twice\n  mend: one header, its values separated by commas")
        found[name] = value
    authorised = "authorization" in {name.lower() for name in found}
    if token_file is not None:
        if authorised:
            raise UsageError("--header Authorization and --token-file: expected one of them, found both")
        found["Authorization"] = f"Bearer {_token_of(token_file)}"
    elif not authorised and os.environ.get(TOKEN_VARIABLE):
        found["Authorization"] = f"Bearer {_checked(os.environ[TOKEN_VARIABLE], f'the variable {TOKEN_VARIABLE}')}"
    return found


def without_secrets(text: str, headers: Mapping[str, str]) -> str:
    """What a server said, without the values that it was sent: echoing servers and debug pages repeat them."""
    for value in headers.values():
        for secret in (value, value.rpartition(" ")[2]):  # `Bearer TOKEN`, and TOKEN alone
            if len(secret) < SHORTEST:
                continue
            # A message is cut to a length, and then ends in the middle of one.
            cuts = (f"{secret[:end]}..." for end in range(len(secret) - 1, SHORTEST - 1, -1))
            cut = next((cut for cut in cuts if cut in text), None)
            text = text.replace(secret, NOT_SHOWN).replace(cut or secret, NOT_SHOWN)
    return text


def _header(header: str, number: int) -> tuple[str, str]:
    """`Name: value` in its two parts. Raises UsageError."""
    name, colon, value = header.partition(":")
    if not colon or not NAME.fullmatch(name):
        raise UsageError(
            f"--header: expected 'Name: value' with a name of letters, digits and hyphens, found something else in "
            f"header {number} (not shown here, it may be secret)"
        )
    if not VALUE.fullmatch(value.strip()):
        raise UsageError(f"--header: expected printable ASCII as the value of {name}, found other characters")
    if name.lower() == "host":
        raise UsageError("--header: expected no Host, which names the virtual host\n  mend: --authority does that")
    if name.lower() in RESERVED or name.lower().startswith("grpc-"):
        raise UsageError(f"--header: expected no {name}: evaluate, or its HTTP client, sets it itself")
    return name, value.strip()


def _token_of(token_file: str) -> str:
    """The file's only line. Raises NotFoundError, OptionsError."""
    try:
        text = Path(token_file).read_text("ascii")
    except UnicodeDecodeError:  # its message would quote the bytes
        raise OptionsError(
            f"--token-file: expected a token of ASCII characters, found others in {token_file}"
        ) from None
    except FileNotFoundError as error:
        raise NotFoundError(f"--token-file: expected a file with the token, found nothing at {token_file}") from error
    except OSError as error:
        raise OptionsError(f"--token-file: cannot read {token_file} ({error.strerror})") from error
    return _checked(text, f"--token-file {token_file}")


def _checked(text: str, where: str) -> str:
    """The token without the line feed that editors put behind it. Raises OptionsError."""
    token = text.strip()
    if not token:
        raise OptionsError(f"{where}: expected a token, found nothing in it")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise OptionsError(
            f"{where}: expected a token alone, found a space, a line break or a character that no token has within it "
            "(not shown here)"
        )
    return token
