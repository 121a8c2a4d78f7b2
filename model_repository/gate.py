"""The gate before a publication: what an evaluation has to say."""

from __future__ import annotations

import json

from converter.errors import OptionsError, Problem, SourceError, SourceMissingError, report
from converter.formats import folder
from model_repository.versions import DIGEST


def check_gate(results: str, weights: str) -> None:
    """Whether an evaluation speaks for a model.

    Args:
        results: folder of `evaluate`.
        weights: what config.pbtxt of the model says as manifest_sha256.

    Raises:
        SourceMissingError, SourceError: there are no such results, or no sense can be made of them.
        OptionsError: it failed, or is one of other weights. That no retry mends, which is why it is not 1.
    """
    storage = folder(results)
    where = storage.path("results.json")
    if not storage.is_file("results.json"):
        raise SourceMissingError(f"{where}: no such file; expected the folder of a finished `evaluate`")
    try:
        found = json.loads(storage.read("results.json"))
        digest, requests = found["model"]["manifest_sha256"], found["requests"]
        completed, failed = int(requests["completed"]), int(requests["failed"])
        allowed = int(found.get("options", {}).get("max_failed", 0))
        comparison = found.get("comparison")
        verdict = str(comparison["verdict"]).upper() if comparison is not None else "PASS"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{where}: expected results of `evaluate`, found: {reason}") from error
    faults = []
    if digest != weights:
        faults.append(Problem("weights", f"{DIGEST} {weights}", str(digest or "not stated")))
    if failed > allowed or not completed:
        faults.append(Problem("requests", f"at most {allowed} failed", f"{failed} failed, {completed} completed"))
    if verdict != "PASS":
        faults.append(Problem("comparison", "PASS", verdict))
    if faults:
        raise OptionsError(report(f"--gate {results}: does not speak for this model; nothing is published", faults))
