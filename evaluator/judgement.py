"""What the results of a run mean for its exit code: too many failed requests before a regression before no verdict."""

from collections.abc import Mapping
from typing import Any

from evaluator import rouge, verdict
from evaluator.errors import InconclusiveError, RegressedError, TooManyFailuresError
from evaluator.explain import mend_of

ERRORS_SHOWN = 3  # distinct ones of each load

Results = Mapping[str, Any]


def require_few_failures(results: Results, max_failed: int) -> None:
    """Raise TooManyFailuresError when more than `max_failed` requests failed, under whichever load."""
    loads = results["sweep"]
    lines = [
        line
        for load in loads
        if load["requests"]["failed"] > max_failed
        for line in _failed(load, results, max_failed, f" at {load['load']['name']}" if len(loads) > 1 else "")
    ]
    if lines:
        raise TooManyFailuresError("\n  ".join(lines))


def _failed(load: Results, results: Results, max_failed: int, at: str) -> list[str]:
    """How many requests failed under a load, of what, what to do, and where to read on."""
    failed, errors = load["requests"]["failed"], list(load["errors"].items())[:ERRORS_SHOWN]
    told = []
    for error, count in errors:
        mend = mend_of(error)
        told += [f"{count} x {error}", *([f"  mend: {mend}"] if mend else [])]
    others = failed - sum(count for _, count in errors)
    return [
        f"{failed} of {results['dataset']['rows']} requests failed{at}, at most {max_failed} may (--max-failed)",
        *told,
        *([f"and {others} x other errors"] if others else []),
        f"each is in {results['options']['output']}/{load['samples']}, field error",
    ]


def require_quality(comparison: Results | None) -> None:
    """Raise RegressedError, or InconclusiveError, when there is a comparison and its verdict is not PASS."""
    if comparison is None or comparison["verdict"] == verdict.PASS:
        return
    margin, failed = comparison["margin"], comparison["verdict"] == verdict.FAIL
    lines = [_difference(name, comparison["metrics"][name], failed) for name in rouge.JUDGED]
    if failed:
        first = f"FAIL: worse than {comparison['baseline']} by more than {margin:g} points of ROUGE"
        raise RegressedError("\n  ".join([first, *filter(None, lines)]))
    first = f"INCONCLUSIVE: {comparison['rows']} rows do not tell whether {margin:g} points were lost"
    raise InconclusiveError("\n  ".join([first, *filter(None, lines), *comparison["notes"]]))


def _difference(name: str, of: Results, decided: bool) -> str:
    """Of a metric, and how many rows would decide it; empty where no row has both answers."""
    if of["difference"] is None:
        return ""
    needed = "" if decided or not of["rows_needed"] else f", about {of['rows_needed']} rows would tell"
    return f"{name}: {of['difference']:+.3f} ({of['low']:+.3f} to {of['high']:+.3f}){needed}"
