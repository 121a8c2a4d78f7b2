"""Text <-> token ids, as the model was trained. Lies beside model.py of the models that need it.

    tokenizer/ ─> tokenizer.json | SentencePiece model ─> Tokenizer
    text ─> pieces ─> an encoder's input: pieces, then the end token
                  └─> a decoder's prompt: what the tokenizer puts before a text, pieces, no end token
    ids ─> text

The libraries are those that wrote the files, tokenizers and sentencepiece: two small wheels, the same ids with every
version, no guess at a class from the name of a folder. transformers' AutoTokenizer needs all of transformers in the
server's environment and takes seconds to import in each of the two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

# In the order they are looked for: tokenizer.json has the tokens, too, that were added later.
FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


class Tokenizer(Protocol):
    """What preprocessing and postprocessing need."""

    def pieces(self, text: str) -> list[int]:
        """Nothing added."""

    def start(self, text: str, end_id: int) -> list[int]:
        """A decoder's prompt: begins as the tokenizer begins texts (LLaMA's `<s>`), and does not end."""

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        FileNotFoundError: there is none of FILES.
        ImportError: its library is not installed where the server runs.
    """
    for name in FILES:
        if (folder / name).is_file():
            return HuggingFace(folder / name) if name.endswith(".json") else SentencePiece(folder / name)
    raise FileNotFoundError(f"{folder}: expected a tokenizer, found none of {', '.join(FILES)}")


class SentencePiece:
    """A SentencePiece model."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(file))
        start_id: int = self._processor.bos_id()
        self._start = [start_id] if start_id >= 0 else []
        self._size, self._unknown = self._processor.get_piece_size(), self._processor.unk_id()

    def pieces(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def start(self, text: str, end_id: int) -> list[int]:
        return [*self._start, *self.pieces(text)]

    def decode(self, ids: Sequence[int]) -> str:
        # A model's vocabulary is padded beyond the pieces; such an id stands for no text (seqio decodes it so, too).
        return str(self._processor.decode([id if id < self._size else self._unknown for id in ids]))


class HuggingFace:
    """A tokenizer.json."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(file))
        self._backend.no_truncation()  # both may be saved in the file
        self._backend.no_padding()

    def pieces(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def start(self, text: str, end_id: int) -> list[int]:
        ids = list(self._backend.encode(text).ids)
        return ids[:-1] if ids[1:] and ids[-1] == end_id else ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True))
