"""Triton's log: which of its lines say what went wrong, told once, in plain text and without what is always there.

E1121 03:56:31.046955 3766 model_lifecycle.cc:642] "failed to load 'ul2' version 1: ...\\nAt:\\n ..."   an error
[libprotobuf ERROR ...:337] Error parsing text-format inference.ModelConfig: 6:12: ...                 an error
I1121 ... pb_stub.cc:2105]  Failed to preinitialize Python stub: ...                                   one, too
I1121 ... "loading: ul2:1"                                                        which models are on their way
anything else                                                                  what backends and models print
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

REASONS_SHOWN = 10  # errors in one message
INNERMOST, OUTERMOST = 2, 3  # frames of a Python model's traceback: what was raised there, and where in model.py

_ERROR = re.compile(
    r'^E\d{4} \S+ \d+ \S+\] "(?P<triton>.*)"$'
    r"|^\[libprotobuf ERROR \S+\] (?P<protobuf>.*)$"
    # a stub that finds no model.py ends, and Triton waits for it for ever: only the stub says why
    r"|^I\d{4} \S+ \d+ pb_stub\.cc:\d+\] +(?P<stub>Failed to preinitialize .*)$"
    r"|^error: creating server: (?!Internal - failed to load all models)(?P<verdict>.*)$"  # nothing of the repository's
)
_NOISE = re.compile(
    r"CudaDriverHelper has not been initialized|ERROR: Failed to create instance|unable to create stream for \S+ CUDA"
)
_OTHER = re.compile(r"^(?![IWE]\d{4} |[+|]|Error: Failed to initialize NVML|error: creating server)\s*\S")
_LOADING = re.compile(r'\] "loading: (.+):\d+"$')
_LOADED = re.compile(r"\] \"successfully loaded '(.+)'\"$")
# an ensemble's error repeats that of its part in full
_REPEATED = re.compile(r"(which has no loaded version)\. Model .*", re.DOTALL)
_TRACE = re.compile(r"\n+At:\n((?:  .*\n?)+)")


def reasons(log: str) -> list[str]:
    """What went wrong, an error each; else the last words that are not Triton's own."""
    found = list(_errors(log.splitlines()))
    return found[:REASONS_SHOWN] or [line for line in log.splitlines() if _OTHER.match(line)][-REASONS_SHOWN:]


def loading(log: str) -> list[str]:
    """Models that Triton has begun to load and not finished."""
    loaded = set(_LOADED.findall("\n".join(lines := log.splitlines())))
    begun = (match[1] for line in lines if (match := _LOADING.search(line)))
    return sorted({name for name in begun if name not in loaded})


class News:
    """Errors of a log that grows, from its end at the start on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = path.stat().st_size

    def reasons(self) -> list[str]:
        """Those of the whole lines since the last call."""
        with self._path.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        return list(_errors(whole.decode(errors="replace").splitlines()))


def _errors(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if match := _ERROR.match(line):
            text = next(filter(None, match.groups()))
            if not _NOISE.search(text):
                yield _plain(text)


def _plain(text: str) -> str:
    """Triton escapes line breaks so that a message stays one line."""
    text = text.replace("\\n", "\n").replace('\\"', '"')
    text = _REPEATED.sub(r"\1", text)
    return _TRACE.sub(lambda trace: _frames(text, trace[1].splitlines()), text).rstrip()


def _frames(text: str, frames: list[str]) -> str:
    if "TritonModelException" in text:  # who raises that has said what there is to say
        return ""
    if len(frames) > INNERMOST + OUTERMOST:
        frames = [*frames[:INNERMOST], "  ...", *frames[-OUTERMOST:]]
    return "\n".join(["\nAt:", *frames])
