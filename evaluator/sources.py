"""Where data comes from: a local path, gs://, hf://, or the name of a data set -> the bytes of its files.

    xsum, samsum ─> hf://owner/name ─> the Hub's Parquet files, through huggingface_hub's cache
    aclsum ─> the installed package's own files
    gs://bucket/object, path ─> the file

Nothing here runs what it fetches: of a data set on the Hub only Parquet files are read, of the package aclsum only its
JSON lines (it is found, never imported).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evaluator import bucket, readers
from evaluator.errors import EvaluateError, NotFoundError, OptionsError, TransientError, UsageError, cannot_import

HUB = "hf://"
PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"  # no `..` at either end: names become names of folders
HUB_NAME = re.compile(rf"({PART}/{PART})(?:/({PART}))?", re.ASCII)

# The authors' own XSum; of SAMSum a copy, because Samsung/samsum is gone (huggingface/datasets, issue 7573).
NAMES = {"xsum": "EdinburghNLP/xsum", "samsum": "knkarthick/samsum"}

# Where a data set's Parquet files are: the Hub converts each public one into a branch of its own
# (huggingface.co/docs/dataset-viewer/parquet); one that it did not convert may hold some itself.
HUB_PLACES = (
    ("refs/convert/parquet", ("{config}/{split}/*.parquet",)),
    ("main", ("{config}/{split}-*.parquet", "{config}/{split}.parquet", "{config}/{split}/*.parquet")),
)
DEFAULT_CONFIG = "default"  # as the Hub names the only one
DEFAULT_FOLDERS = ("data", "default")  # in which `main` holds it

ACLSUM_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}
ACLSUM_SECTIONS = ("abstract", "introduction", "conclusion")
ACLSUM_ASPECTS = ("challenge", "approach", "outcome")

MEND = "give a file of rows (id, document, summary), local or gs://, hf://owner/name, or xsum, samsum, aclsum"


@dataclass(frozen=True)
class Source:
    """The files of a data set, (name, content) each, and how they are read."""

    name: str
    files: Sequence[tuple[str, bytes]]
    format: readers.Format


def fetch(path: str, split: str = "test") -> Source:
    """The files of a data set. `split` is of those that have several: names and the Hub's.

    Raises:
        UsageError: malformed `hf://` or `gs://`, or a split that the data set does not have.
        NotFoundError: it is not there, or may not be read.
        TransientError: a connection that failed.
        OptionsError: a package is not installed.
    """
    if path in NAMES:
        return Source(path, _hub(NAMES[path], None, split, path), readers.PARQUET)
    if path == "aclsum":
        return _aclsum(split)
    if path.startswith(HUB):
        match = HUB_NAME.fullmatch(path.removeprefix(HUB))
        if not match:
            raise UsageError(f"--dataset: expected {HUB}owner/name or {HUB}owner/name/config, found {path}")
        return Source(path.removeprefix(HUB), _hub(match[1], match[2], split, path), readers.PARQUET)
    content = read(path, "--dataset", MEND)
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return Source(name, [(name, content)], readers.format_of(name))


def read(path: str, option: str, mend: str) -> bytes:
    """A whole file, local or gs://. `option` and `mend` are for the message when it is not there.

    Raises:
        UsageError, NotFoundError, TransientError, OptionsError: as `fetch`.
    """
    if bucket.is_one(path):
        return bucket.read(path, option, mend)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise NotFoundError(
            f"{option}: expected a file at {path}, found none that can be read ({reason})\n  mend: {mend}"
        ) from error


def _aclsum(split: str) -> Source:
    """The expert summaries of ACLSum, a row for each paper: id, document, summary.

    `document` is what the annotators read, as the package's own `get_all_sentences` gives it; `summary` is their
    sentences on challenge, approach and outcome, one below the other.
    """
    if split not in ACLSUM_SPLITS:
        raise UsageError(f"--split: aclsum has {', '.join(ACLSUM_SPLITS)}, found {split}")
    package = find_spec("aclsum")
    if package is None or not package.origin:
        raise OptionsError(
            "--dataset: aclsum is read out of the package aclsum, which is not installed here\n"
            "  mend: pip install aclsum  (Python 3.11 or newer)"
        )
    path = Path(package.origin).parent / "dataset" / f"{ACLSUM_SPLITS[split]}.jsonl"
    content = read(str(path), "--dataset aclsum", "pip install --force-reinstall aclsum")
    return Source("aclsum", [(path.name, content)], readers.Format(_papers, "line", "the file of the package aclsum"))


def _papers(content: bytes) -> Iterator[readers.Read]:
    paper: Any
    for place, paper in readers.json_lines(content):
        try:
            sentences = [sentence for section in ACLSUM_SECTIONS for sentence in paper["sentences"][section]]
            summaries = [paper["summary"][aspect] for aspect in ACLSUM_ASPECTS]
            yield place, {"id": paper["id"], "document": " ".join(sentences), "summary": "\n".join(summaries)}
        except (TypeError, KeyError) as error:
            yield place, f"not as aclsum 0.1.2 has it ({type(error).__name__}: {error})"


def _hub(repository: str, config: str | None, split: str, asked: str) -> list[tuple[str, bytes]]:
    """The Parquet files of a split: (path in the repository, content), in order."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise cannot_import("huggingface_hub", f"--dataset {asked}", error, extra="hub") from error
    there = f"--dataset: {asked} (split {split} of {repository} on the Hugging Face Hub)"
    unreachable: Exception | None = None
    for revision, patterns in HUB_PLACES:
        folders = [config] if config else DEFAULT_FOLDERS if revision == "main" else [DEFAULT_CONFIG]
        wanted = [pattern.format(config=folder, split=split) for pattern in patterns for folder in folders]
        try:
            folder = _snapshot(repository, revision, wanted)
        except errors.RevisionNotFoundError:
            continue
        except errors.LocalEntryNotFoundError as error:  # no connection, and not in the cache: the other one may be
            unreachable = error
            continue
        except Exception as error:  # httpx, requests or xet raise their own, by version
            raise _hub_error(there, error) from error
        files = sorted({path for pattern in wanted for path in folder.glob(pattern)})
        if files:
            return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in files]
    if unreachable:
        raise _hub_error(there, unreachable) from unreachable
    raise NotFoundError(
        f"{there}: expected Parquet files, found none for "
        f"{f'the configuration {config}' if config else 'a data set with one configuration'}{_offered(repository)}\n"
        f"  mend: name a configuration ({HUB}{repository}/CONFIG) and a split that it has (--split)"
    )


def _snapshot(repository: str, revision: str, wanted: list[str]) -> Path:
    """The cache's folder of a revision, with the files that match; without a connection what the cache has of them."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted))


def _offered(repository: str) -> str:
    """`; it has a/test, a/train, ...`, or nothing where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repository, repo_type="dataset", revision=HUB_PLACES[0][0])
    except Exception:  # the message is as true without it
        return ""
    pairs = sorted({path.rsplit("/", 1)[0] for path in files if path.endswith(".parquet") and "/" in path})
    return f"; it has (configuration/split) {', '.join(pairs)}" if pairs else ""


def _hub_error(there: str, error: Exception) -> EvaluateError:
    """Its text is ours alone: whatever the library quotes, no token can be in it."""
    from huggingface_hub import constants, errors

    causes = list(_causes(error))
    statuses = [one.response.status_code for one in causes if isinstance(one, errors.HfHubHTTPError)]
    if any(isinstance(one, errors.HFValidationError) for one in causes):
        return UsageError(f"{there}: the Hub has no such names")
    if {401, 403, 404} & set(statuses):
        return NotFoundError(
            f"{there}: the Hub shows none to you ({statuses[0]}): it is not there, private, or its licence has to be "
            "accepted\n  mend: compare the name with the address of its page; HF_TOKEN names a token that may read it"
        )
    if constants.HF_HUB_OFFLINE:
        return NotFoundError(
            f"{there}: not in the cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set\n"
            "  mend: download it once without that, or give a file"
        )
    system = [one.strerror for one in causes if isinstance(one, OSError) and one.errno]
    reason = f"status {statuses[0]}" if statuses else (system or [type(causes[0]).__name__])[-1]
    return TransientError(f"{there}: the Hub is out of reach ({reason})\n  mend: run the command again, or give a file")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
