"""Models of the Hugging Face Hub: `hub:ORG/NAME[@REVISION]` becomes a local folder, fetched once.

huggingface_hub does the work, in its own cache and by its own variables: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE,
HF_ENDPOINT. Where the Hub cannot be reached, what is in the cache is taken.

Source of the facts: huggingface_hub, _snapshot_download.py, utils/_http.py and errors.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from converter.errors import FtconvertError, IncompleteError, OptionsError, SourceMissingError, UsageError

SCHEME = "hub:"
PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"  # no `..` at either end: names become names of folders
URI = re.compile(rf"{SCHEME}({PART}/{PART})(?:@({PART}(?:/{PART})*))?", re.ASCII)

# Only what a conversion reads, and only beside config.json: repositories hold the same weights for other programs, too.
DESCRIPTIONS = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("*.model", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    "chat_template*",
)
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
TORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
BELOW = "*/*"


def download(uri: str) -> str:
    """The local folder of a model's snapshot, downloaded where it is not in the cache yet.

    torch's files are fetched only where there is nothing in safetensors.

    Raises:
        UsageError: not `hub:ORG/NAME[@REVISION]`.
        OptionsError: ftconvert[hub] is not installed.
        SourceMissingError: no such model or revision; it may not be read; offline and not in the cache.
        IncompleteError: the connection, the Hub's own error, a full disk.
    """
    name, revision = named(uri)
    folder = _fetch(uri, name, revision, (*DESCRIPTIONS, *SAFETENSORS))
    if not any(Path(folder).glob("*.safetensors")):
        # the same commit, should the branch move meanwhile: a snapshot's folder is named by it
        folder = _fetch(uri, name, Path(folder).name, (*DESCRIPTIONS, *TORCH))
    return folder


def named(uri: str) -> tuple[str, str | None]:
    """ORG/NAME and the revision, if there is one.

    Raises:
        UsageError: not `hub:ORG/NAME[@REVISION]`.
    """
    match = URI.fullmatch(uri)
    if not match:
        raise UsageError(f"{uri}: expected {SCHEME}ORG/NAME or {SCHEME}ORG/NAME@REVISION (a branch, tag or commit)")
    return match[1], match[2]


def _fetch(uri: str, name: str, revision: str | None, patterns: Sequence[str]) -> str:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise OptionsError(f"{uri} needs huggingface_hub: pip install ftconvert[hub]") from error
    try:
        return huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=[BELOW]
        )
    except HFValidationError as error:
        raise UsageError(f"{uri}: the Hub has no such names: {error}") from error
    except Exception as error:  # httpx, requests or xet raise their own, by version
        raise _translated(uri, error) from error


def _translated(uri: str, error: Exception) -> FtconvertError:
    """The project's error. Its text is ours alone: whatever the library quotes, no token can be in it."""
    from huggingface_hub import constants, errors

    causes = list(_causes(error))
    statuses = [one.response.status_code for one in causes if isinstance(one, errors.HfHubHTTPError)]
    if any(isinstance(one, errors.RevisionNotFoundError) for one in causes):
        return SourceMissingError(f"{uri}: the model has no such revision. Name one of its branches, tags or commits.")
    gated = any(isinstance(one, errors.GatedRepoError) for one in causes)
    if 404 in statuses:
        return SourceMissingError(f"{uri}: the Hub has no such model. Compare the name with the address of its page.")
    if gated or 401 in statuses or 403 in statuses:
        return SourceMissingError(
            f"{uri}: the Hub shows no such model to you: it is not there, private, or its licence has to be accepted. "
            "Accept the licence on the model's page and set HF_TOKEN to a token that may read it."
        )
    if constants.HF_HUB_OFFLINE:
        return SourceMissingError(
            f"{uri}: not in the cache, {constants.HF_HUB_CACHE}, or not all of it, and HF_HUB_OFFLINE is set. "
            "Download it once without that."
        )
    system = [one.strerror for one in causes if isinstance(one, OSError) and one.errno]
    reason = f"status {statuses[0]}" if statuses else (system or [type(error).__name__])[-1]
    return IncompleteError(f"{uri}: cannot be downloaded: {reason}. Run the same command again; it goes on.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
