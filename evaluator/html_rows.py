"""The rows that report.html shows side by side: those with the lowest scores, those that differ most from the baseline.

    samples, scores ─> ids ─> document, reference, answer | baseline's answer, what differs marked

A few rows and the beginning of each text: the whole of it is in samples.jsonl.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean
from typing import TYPE_CHECKING

from evaluator import rouge, words

if TYPE_CHECKING:
    from evaluator.html_report import Material

ROWS = 10  # of each kind
LENGTH = 700  # characters of a text
DOCUMENT = 400  # of a document
BEFORE = 80  # characters shown before the first difference, where the beginning is the same for longer than LENGTH

_INDEX = {name: rouge.TYPES.index(name) for name in rouge.JUDGED}  # in a row's scores

Part = tuple[str, bool]  # a piece of a text, and whether the other text has something else there


@dataclass(frozen=True)
class Text:
    """`note` says how much of it is shown, where that is not all."""

    title: str
    parts: Sequence[Part]
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """A row, its figures in words, and its texts beside each other."""

    id: str
    facts: Sequence[str]
    texts: Sequence[Text]


def worst(material: "Material") -> list[Shown]:
    """Completed rows with the lowest mean of the judged metrics, the lowest first."""
    means = {id: fmean(scores[_INDEX[name]] for name in _INDEX) for id, scores in material.scores.items()}
    ids = sorted(means, key=lambda id: means[id])[:ROWS]
    return _shown(material, {id: [] for id in ids})


def diverging(material: "Material") -> list[Shown]:
    """Those that the comparison names, in its order; none without a baseline."""
    found = (material.results.get("comparison") or {}).get("most_diverging", [])
    unit = ((material.results.get("comparison") or {}).get("first_divergence") or {}).get("unit", "token")
    facts = {
        row["id"]: [
            f"difference {words.signed(row['difference'])}",
            f"the same for {words.count(row['position'], unit)}",
        ]
        for row in found[:ROWS]
    }
    return _shown(material, facts)


def compared(left: str, right: str) -> tuple[list[Part], list[Part]]:
    """Both texts in pieces, marked where a word of one is not in the other at that place."""
    ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right))
    parts: tuple[list[Part], list[Part]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        for side, piece in zip(parts, ("".join(ours[a:b]), "".join(theirs[c:d])), strict=True):
            if piece:
                side.append((piece, kind != "equal"))
    return parts


def _shown(material: "Material", facts: Mapping[str, Sequence[str]]) -> list[Shown]:
    samples = {sample.id: sample for sample in material.samples if sample.id in facts}
    shown = []
    for id, known in facts.items():
        sample = samples.get(id)
        if sample is None:
            continue
        scores = material.scores.get(id)
        figures = [f"{name} {words.points(scores[_INDEX[name]], 1)}" for name in _INDEX] if scores else []
        cut = ["prompt cut"] if sample.truncated else []
        texts = [_text("Document", material.documents[id], DOCUMENT)] if id in material.documents else []
        texts.append(_text("Reference", sample.reference))
        texts += _answers(sample.prediction, material.baseline, id)
        shown.append(Shown(id, [*figures, *known, *cut], texts))
    return shown


def _answers(ours: str | None, baseline: Mapping[str, str | None] | None, id: str) -> list[Text]:
    theirs = (baseline or {}).get(id)
    titles = ("Endpoint", "Baseline")
    if baseline is None:
        return [_text(titles[0], ours)]
    if ours is None or theirs is None:
        return [_text(titles[0], ours), _text(titles[1], theirs)]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    begin = max(0, same - BEFORE) if same > LENGTH - BEFORE and ours != theirs else 0
    pieces = compared(*(text[begin : begin + LENGTH] for text in (ours, theirs)))
    return [
        Text(title, parts, _note(text, begin, LENGTH))
        for title, parts, text in zip(titles, pieces, (ours, theirs), strict=True)
    ]


def _text(title: str, text: str | None, length: int = LENGTH) -> Text:
    if text is None:
        return Text(title, [], "no answer")
    return Text(title, [(text[:length], False)], _note(text, 0, length))


def _note(text: str, begin: int, length: int) -> str:
    end = min(begin + length, len(text))
    if not text:
        return "empty"
    return "" if end - begin == len(text) else f"characters {begin + 1:,} to {end:,} of {len(text):,}"
