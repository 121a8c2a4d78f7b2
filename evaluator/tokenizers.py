"""Tokenizers: text <-> token ids, as the model was trained.

    path ─> SentencePiece .model | tokenizer.json | folder that holds one of them ─> Tokenizer
    text ─> pieces, cut to leave room, then the end token ─> Prompt          (what T5 is given; a decoder: no end token)
    text ─> cut behind the last piece that has room ─> Prompt                (models that take text)
    ids ─> cut at the first end token ─> text                                (what is given back)

In a folder tokenizer.json wins over spiece.model and tokenizer.model: it is what transformers loads, with the tokens
that were added later.
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evaluator import bucket
from evaluator.errors import NotFoundError, OptionsError, missing_package

CONFIG = "tokenizer_config.json"
FOLDER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")  # in the order they are looked for
PAD_TOKEN = "<pad>"
END_TOKENS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")  # in the order they are looked for


class Tokenizer(Protocol):
    """`encode` adds no special tokens; `decode` drops them (padding and end among them)."""

    name: str  # of its file
    sha256: str

    @property
    def end_id(self) -> int: ...

    @property
    def pad_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def ends(self, text: str) -> list[int]:
        """Where in `text` each piece of `encode(text)` ends, in characters."""
        ...


@dataclass(frozen=True)
class Prompt:
    """What is sent for one row: the text or its ids, and whether it was cut to fit. Without a tokenizer no ids."""

    text: str
    input_ids: Sequence[int] | None
    truncated: bool


def prompt(tokenizer: Tokenizer, text: str, max_input_tokens: int, end: bool = True) -> Prompt:
    """The first `max_input_tokens - 1` pieces of `text`, then the end token, as T5's own preprocessing cuts.

    Without `end` it is the first `max_input_tokens`: after an end token a decoder would begin another text.
    """
    ids = tokenizer.encode(text)
    last = (tokenizer.end_id,) if end else ()
    room = max_input_tokens - len(last)
    if len(ids) <= room:
        return Prompt(text, array("I", (*ids, *last)), truncated=False)
    # By offsets: what decoding gives need not be what was encoded (spaces, unknown characters).
    return Prompt(text[: tokenizer.ends(text)[room - 1]], array("I", (*ids[:room], *last)), truncated=True)


def until_end(ids: Sequence[int], end_id: int) -> list[int]:
    """`ids` before the first end token; all of them where there is none."""
    ids = list(ids)
    return ids[: ids.index(end_id)] if end_id in ids else ids


def load(path: str) -> Tokenizer:
    """Open a SentencePiece `.model`, a `tokenizer.json`, or a Hugging Face folder that holds one of FOLDER_FILES.

    In a bucket, too, from which the files are fetched.

    Raises:
        NotFoundError: there is nothing at `path`, or a folder without a tokenizer.
        OptionsError: the file is no tokenizer, has no end token, or its library is not installed.
    """
    if bucket.is_one(path):
        with tempfile.TemporaryDirectory() as folder:
            return _opened(_fetched(path, Path(folder)), path)
    return _opened(Path(path), path)


def _fetched(uri: str, folder: Path) -> Path:
    """The file, or folder, at a gs:// address, here."""
    mend = "give the tokenizer the model was trained with: a file, or the folder it was saved in"
    if not uri.endswith((".model", ".json")):
        for name in {*bucket.names(uri, "--tokenizer")} & {*FOLDER_FILES, CONFIG}:
            (folder / name).write_bytes(bucket.read(f"{uri.rstrip('/')}/{name}", "--tokenizer", mend))
        return folder
    file = folder / uri.rpartition("/")[2]
    file.write_bytes(bucket.read(uri, "--tokenizer", mend))
    return file


def _opened(file: Path, path: str) -> Tokenizer:
    if file.is_dir():
        found = [file / name for name in FOLDER_FILES if (file / name).is_file()]
        if not found:
            raise NotFoundError(
                f"--tokenizer: expected one of {', '.join(FOLDER_FILES)} in the folder {path}, found none of them\n"
                "  mend: give the folder the tokenizer was saved in, or the file itself"
            )
        file = found[0]
    if not file.is_file():
        raise NotFoundError(
            f"--tokenizer: expected a SentencePiece .model, a tokenizer.json or a folder with one of them, "
            f"found nothing at {path}"
        )
    return HuggingFace(file) if file.suffix == ".json" else SentencePiece(file)


class SentencePiece:
    """A SentencePiece model; the end token is its `eos_id`, the padding its `pad_id`."""

    def __init__(self, file: Path) -> None:
        self.name, self.sha256 = file.name, _sha256(file)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise missing_package("sentencepiece", f"the tokenizer {file}") from error
        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise OptionsError(f"--tokenizer: {file} is not a SentencePiece model ({error})") from error
        self.end_id: int = self._processor.eos_id()
        pad_id = self._processor.pad_id()
        self.pad_id: int | None = pad_id if pad_id >= 0 else None
        self._unknown_id: int = self._processor.unk_id()
        self._size: int = self._processor.get_piece_size()
        if self.end_id < 0:
            raise OptionsError(
                f"--tokenizer: {file} defines no end token (its eos_id is {self.end_id}), which every prompt ends in\n"
                "  mend: give the tokenizer the model was trained with"
            )

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def ends(self, text: str) -> list[int]:
        return [end for _, end in self._processor.encode(text, return_type="offset_mapping")["offsets"]]

    def decode(self, ids: Sequence[int]) -> str:
        # A model's vocabulary is padded beyond the pieces; seqio decodes such an id as unknown, so T5's figures do too.
        known = [id if id < self._size else self._unknown_id for id in ids]
        return str(self._processor.decode(known))


class HuggingFace:
    """A `tokenizer.json`.

    The file itself does not say which token ends a text. It is `eos_token` of the tokenizer_config.json beside it;
    without one, the first of END_TOKENS that is a special token of the file. The padding is `pad_token`, or PAD_TOKEN.
    """

    def __init__(self, file: Path) -> None:
        self.name, self.sha256 = file.name, _sha256(file)
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise missing_package("tokenizers", f"the tokenizer {file}") from error
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise OptionsError(f"--tokenizer: {file} is not a tokenizer.json ({error})") from error
        # Both may be saved in the file; here the prompt is cut and counted by `prompt`.
        self._backend.no_truncation()
        self._backend.no_padding()
        special = {token.content: id for id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        stated = _stated_token(file.parent / CONFIG, "eos_token")
        end_id = self._backend.token_to_id(stated) if stated else None
        if end_id is None:
            end_id = next((special[token] for token in END_TOKENS if token in special), None)
        if end_id is None:
            raise OptionsError(
                f"--tokenizer: {file} has no end token, which every prompt ends in: expected an eos_token in "
                f"tokenizer_config.json beside it or one of {' '.join(END_TOKENS)}, "
                f"found the special tokens {' '.join(sorted(special)) or '(none)'}"
            )
        self.end_id: int = end_id
        padding = _stated_token(file.parent / CONFIG, "pad_token") or PAD_TOKEN
        self.pad_id: int | None = self._backend.token_to_id(padding)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def ends(self, text: str) -> list[int]:
        return [end for _, end in self._backend.encode(text, add_special_tokens=False).offsets]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise NotFoundError(f"--tokenizer: {file} cannot be read ({error.strerror})") from error


def _stated_token(config: Path, name: str) -> str | None:
    """A token of a tokenizer_config.json: a string, or an object with `content`. None where there is none."""
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text("utf-8")).get(name)
    except (ValueError, AttributeError) as error:
        raise OptionsError(f"--tokenizer: {config} is not a JSON object ({error})") from error
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
