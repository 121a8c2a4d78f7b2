"""What the terminal and report.html both say: results.json as tables and facts, in words.

results.json, samples ─> Table, facts, Failure ─> report.py (rich), html_report.py (Jinja)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from evaluator import records, rouge, words
from evaluator.explain import mend_of
from evaluator.records import Sample

VERDICTS = {
    "PASS": "As good as the baseline, within the margin.",
    "FAIL": "Worse than the baseline by more than the margin.",
    "INCONCLUSIVE": "These rows cannot tell whether the margin is kept.",
}
TIMES = {
    "latency_s": "latency",
    "time_to_first_token_s": "time to first token",
    "time_per_output_token_s": "time per output token",
    "inter_token_latency_s": "between responses",
}
IDS_SHOWN = 3  # of the rows that an error failed
ID_LENGTH = 60  # characters of each

Results = Mapping[str, Any]
Facts = list[tuple[str, str]]  # what, its value


@dataclass(frozen=True)
class Table:
    """The first cell of a row says what the others are of."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Failure:
    """Requests that failed alike. `mend` is what to do about it, where that is known."""

    error: str
    count: int
    ids: str
    mend: str | None


def quality(results: Results) -> Table | None:
    """ROUGE; None where nothing completed."""
    scores, failed = results["rouge"], results["requests"]["failed"]
    known = {name: scores[name] for name in rouge.TYPES if scores[name]["mean"] is not None}
    if not known:
        return None
    medians = all("median" in of for of in known.values())
    rows = [
        [
            name,
            words.points(of["mean"]),
            words.between(of["low"], of["high"]),
            *([words.points(of["median"])] if medians else []),
            *([words.points(scores["failed_as_zero"][name])] if failed else []),
            scores["profile"],
        ]
        for name, of in known.items()
    ]
    columns = ["metric", "mean", f"{rouge.CONFIDENCE} % interval", *(["bootstrap median"] if medians else [])]
    columns += [*(["mean, failed rows as 0"] if failed else []), "profile"]
    return Table(f"ROUGE, profile {scores['profile']} (F x 100)", columns, rows)


def comparison(results: Results) -> Table | None:
    """Differences to the baseline; None without one, or where no row has both answers."""
    found = results.get("comparison") or {"metrics": {}}
    rows = [
        [
            name,
            words.signed(of["difference"]),
            words.between(of["low"], of["high"], 3),
            words.signed(found["failed_as_zero"].get(name)),
            f"{of['rows_needed']:,}" if of["rows_needed"] else words.NONE,
        ]
        for name, of in found["metrics"].items()
        if of["difference"] is not None
    ]
    if not rows:
        return None
    profile = found.get("profile") or results["rouge"]["profile"]
    columns = ["metric", "difference", f"{rouge.CONFIDENCE} % interval", "failed rows as 0", "rows needed"]
    note = "rougeL is not judged. Rows needed: so many like these would decide."
    return Table(f"Endpoint minus baseline, profile {profile} (points)", columns, rows, note)


def verdict(found: Results) -> Facts:
    """What belongs to the verdict of a comparison, but for the differences."""
    needed = [found["metrics"][name]["rows_needed"] for name in rouge.JUDGED if found["metrics"][name]["rows_needed"]]
    missing = found.get("unpaired") or {}
    unpaired = ", ".join(f"{rows:,} of the {who}" for who, rows in missing.items()) or words.NONE
    facts = [
        ("baseline", str(found["baseline"])),
        ("margin", f"{found['margin']:g} points"),
        ("rows compared", f"{found['rows']:,}"),
        ("without a pair", unpaired),
        ("the same answer", words.share(found["exact_match"])),
        ("the others", _parting(found.get("first_divergence"))),
    ]
    told = needed and found["verdict"] == "INCONCLUSIVE"  # a FAIL needs no more of them
    return facts + ([("rows needed", f"about {max(needed):,}")] if told else [])


def times(results: Results) -> Table | None:
    """Latency, and of streams the rest; None where nothing completed."""
    if results["latency_s"]["mean"] is None:
        return None
    rows = [[name, *map(words.duration, results[key].values())] for key, name in TIMES.items() if key in results]
    return Table("Times", ["", *results["latency_s"]], rows)


def loads(results: Results) -> Table | None:
    """The sweep; None for a single load."""
    runs = results.get("sweep", [])
    if len(runs) < 2:
        return None
    columns = [*runs[0]["load"]["name"].split()[:1], "requests/s", "output tokens/s", "p50", "p99", "failed", "changed"]
    goodput = "goodput" in runs[0]
    rows = []
    for run in runs:
        rates, latency = run["throughput"], run["latency_s"]
        cells = [f"{run['load']['value']:g}", _number(rates["requests_per_s"]), _number(rates["output_tokens_per_s"])]
        cells += [words.duration(latency[name]) for name in ("p50", "p99")]
        cells += [f"{run['requests']['failed']:,}", f"{run['changed']:,}"]
        rows.append(cells + ([words.share(run["goodput"]["share"])] if goodput else []))
    note = "The first load is the one whose answers are scored; changed: rows answered otherwise than there."
    return Table("Loads", columns + ["goodput"] * goodput, rows, note)


def server(results: Results) -> Table | None:
    """Queue and compute times; None where the server does not say."""
    found = results.get("server")
    if not found:
        return None
    rows = [
        [name, f"{of['requests']:,}", f"{of['executions']:,}", *map(words.duration, (of["queue_s"], of["compute_s"]))]
        for name, of in found.items()
    ]
    note = "The server's own counters for this run; queue and compute are means of one request."
    return Table("In the server", ["model", "requests", "executions", "queue", "compute"], rows, note)


def speed(results: Results) -> Table | None:
    """Figures of two folders beside each other; None where there are no two."""
    found = (results.get("comparison") or {}).get("speed")
    if not found:
        return None
    rows = []
    for section, figures in found.items():
        told = words.duration if section.endswith("_s") else _number
        for name, of in figures.items():
            ratio = words.NONE if of["ratio"] is None else f"{of['ratio']:.3f}"
            rows.append([f"{TIMES.get(section, section)} {name}", told(of["baseline"]), told(of["endpoint"]), ratio])
    return Table("Speed beside the baseline", ["", "baseline", "endpoint", "endpoint / baseline"], rows)


def throughput(results: Results) -> str:
    """At the load whose answers are scored."""
    rates, load = results["throughput"], results["options"]["loads"][0]
    tokens = rates["output_tokens_per_s"]
    counted = "" if tokens is None else f", {words.rate(tokens, 'output tokens')}"
    return f"{words.rate(rates['requests_per_s'], 'requests')}{counted} at {load}"


def goodput(results: Results) -> str | None:
    """None without --slo."""
    found = results.get("goodput")
    if found is None:
        return None
    limits = ", ".join(f"{name} at most {words.duration(limit)}" for name, limit in found["slo_s"].items())
    return f"{words.rate(found['requests_per_s'], 'requests')}, {words.share(found['share'])} with {limits}"


def failures(samples: Sequence[Sample], most: int, length: int) -> tuple[list[Failure], int]:
    """The `most` frequent errors, so many characters of each; and how many other errors there are."""
    errors = records.failures(samples)
    found = []
    for error, count in errors[:most]:
        ids = islice((sample.id for sample in samples if sample.error == error), IDS_SHOWN)
        rest = [f"and {count - IDS_SHOWN:,} more"] if count > IDS_SHOWN else []
        named = ", ".join([*(words.excerpt(id, ID_LENGTH) for id in ids), *rest])
        found.append(Failure(words.excerpt(error, length), count, named, mend_of(error)))
    return found, len(errors) - len(found)


def _parting(found: Results | None) -> str:
    """Where answers that differ do so: `12 rows, the same for 3 tokens (median)`."""
    if not found or found.get("median") is None:
        return words.NONE
    median, unit = found["median"], found["unit"]
    return f"{words.count(found['rows'], 'row')}, the same for {median:g} {unit}{'' if median == 1 else 's'} (median)"


def _number(value: float | None) -> str:
    return words.NONE if value is None else words.rounded(value)
