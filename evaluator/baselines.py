"""What an endpoint is compared with: the folder of another run, or a file of answers made elsewhere.

folder ─> results.json, samples.jsonl ─┐
JSON lines of id, prediction ──────────┴─> Baseline: answers by id
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluator import bucket, datasets, readers, sources
from evaluator.errors import DatasetError

MEND = "give the folder of a finished `evaluate`, or JSON lines of id and prediction; local or gs://"
FORMAT = readers.Format(
    readers.json_lines, "line", 'on each line: {"id": ..., "prediction": "..."}, each id once, null where there is none'
)


@dataclass(frozen=True)
class Baseline:
    """Answers by row id, None where there is none; token ids and references of those rows that state them.

    `results` is the folder's results.json, None for a file.
    """

    name: str
    predictions: Mapping[str, str | None]
    output_ids: Mapping[str, list[int]] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, Any] | None = None


def load_baseline(path: str, option: str = "--baseline") -> Baseline:
    """Read the folder of a finished run (results.json, samples.jsonl), or a JSON-lines file of `id` and `prediction`.

    In a bucket a name that ends in .jsonl is a file, any other a folder. `output_ids` and `reference` are read where
    they are there. `option` is for messages.

    Raises:
        DatasetError: malformed; names every faulty line (up to datasets.FAULTS_SHOWN).
        NotFoundError: there is none; a folder without results.json is no finished run.
        UsageError, TransientError, OptionsError: as `sources.read`.
    """
    path = path.rstrip("/") or path
    if path.endswith(".jsonl") if bucket.is_one(path) else not Path(path).is_dir():
        return _answers(path, path, sources.read(path, option, MEND), None)
    results = load_results(path, option)
    samples = f"{path}/samples.jsonl"
    return _answers(path, samples, sources.read(samples, option, MEND), results)


def load_results(folder: str, option: str) -> Mapping[str, Any]:
    """results.json of a folder. Raises as `load_baseline`."""
    path = f"{folder}/results.json"
    content = sources.read(path, option, MEND)
    try:
        results = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{option}: expected results of `evaluate` in {path}, found no JSON ({error})") from error
    if not isinstance(results, dict):
        raise DatasetError(f"{option}: expected results of `evaluate` in {path}, found a {type(results).__name__}")
    return results


def _answers(name: str, path: str, content: bytes, results: Mapping[str, Any] | None) -> Baseline:
    predictions: dict[str, str | None] = {}
    output_ids: dict[str, list[int]] = {}
    references: dict[str, str] = {}
    faults: list[str] = []
    place_of: dict[str, str] = {}
    for place, fields in FORMAT.read(content):
        problem = fields if isinstance(fields, str) else _problem(fields)
        if problem or isinstance(fields, str):
            faults.append(f"{place}: {problem}")
            continue
        identity = str(fields["id"])
        if identity in place_of:
            faults.append(f"{place}: id {identity!r} was already given on {place_of[identity]}")
            continue
        place_of[identity] = place
        predictions[identity] = fields["prediction"]
        if fields.get("output_ids") is not None:
            output_ids[identity] = fields["output_ids"]
        if fields.get("reference") is not None:
            references[identity] = fields["reference"]
    if faults:
        raise datasets.malformed(path, FORMAT, faults)
    if not predictions:
        raise DatasetError(f"{path}: expected at least one answer, found none\n  expected {FORMAT.expected}")
    return Baseline(name, predictions, output_ids, references, results)


def _problem(fields: Mapping[str, Any]) -> str:
    """What is wrong with a line's fields; empty where nothing is."""
    identity, prediction, ids = fields.get("id"), fields.get("prediction"), fields.get("output_ids")
    problems = [datasets.text_problem("id", str(identity) if type(identity) is int else identity)]
    if "prediction" not in fields:
        problems.append("prediction is missing")
    elif prediction is not None:
        problems.append(datasets.text_problem("prediction", prediction))
    if fields.get("reference") is not None:
        problems.append(datasets.text_problem("reference", fields["reference"]))
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        problems.append("output_ids is no list of integers")
    return ", ".join(filter(None, problems))
