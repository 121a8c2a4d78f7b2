"""On which line of a config.pbtxt a field stands: the protobuf that it is parsed into does not know."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""[\s,;]+ | \#[^\n]* | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*') | (?P<mark>[{}<>\[\]:])
        | (?P<word>[^\s,;\#"'{}<>\[\]:]+)""",
    re.VERBOSE,
)
INDEX = re.compile(r"\[\d+\]$")
AGAIN = "again "  # before the entry of a map whose key was there already


@dataclass
class _Message:
    """A message that is being read: the path of its fields, how often each was there, the one that awaits a value."""

    prefix: str
    counts: Counter[str] = field(default_factory=Counter)
    field: str = ""
    in_list: bool = False

    def next_value(self) -> str:
        """Path of the value that comes now."""
        path = f"{self.prefix}{self.field}[{self.counts[self.field]}]"
        self.counts[self.field] += 1
        if not self.in_list:
            self.field = ""
        return path


def places(text: str) -> dict[str, int]:
    """`input[1].name[0]` -> line, from 1, of every value in a text that protobuf has parsed.

    An entry of a map has its key as a name, too: `parameters:data_type`, and `again parameters:data_type`.
    """
    found: dict[str, int] = {}
    messages = [_Message("")]
    line = 1
    for token in TOKEN.finditer(text):
        here, mark, word = messages[-1], token["mark"], token["word"]
        if mark in ("{", "<"):
            path = here.next_value()
            found[path] = line
            messages.append(_Message(f"{path}."))
        elif mark in ("}", ">"):
            messages.pop()
        elif mark in ("[", "]"):
            here.in_list = mark == "["
            here.field = here.field if here.in_list else ""
        elif word and not here.field:
            here.field = word
        elif (word or token["string"]) and here.field:  # a string without a field goes on with the one before it
            path = here.next_value()
            found[path] = line
            if path == f"{here.prefix}key[0]":
                entry = f"{INDEX.sub('', here.prefix[:-1])}:{token[0][1:-1]}"
                found[f"{AGAIN}{entry}" if entry in found else entry] = line
        line += token[0].count("\n")
    return found


def line_of(found: dict[str, int], path: str) -> int | None:
    """The line of `input[1].name`: where nothing says which, the first is meant."""
    fields, colon, key = path.partition(":")
    parts = [part if part.endswith("]") else f"{part}[0]" for part in fields.split(".")]
    if colon:
        parts[-1] = INDEX.sub("", parts[-1])
    return found.get(".".join(parts) + colon + key)
