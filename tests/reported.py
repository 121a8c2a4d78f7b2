"""Material for reports, made up: results as `evaluate` computes them from samples that are drawn."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluated import sample

from evaluator import figures, rouge
from evaluator.html_report import Material
from evaluator.records import Sample

WORDS = "the court of a tool library has small fonts which were written by hand and read in the morning"
PROFILE = {"profile": "t5"}
OPTIONS: dict[str, Any] = {
    "endpoint": "127.0.0.1:8001",
    "model": "ul2",
    "protocol": "auto",
    "dataset": "data/test rows.jsonl",
    "limit": None,
    "shuffle": None,
    "split": "test",
    "tokenizer": "spiece.model",
    "prompt": "summarize: {document}",
    "max_input_tokens": 512,
    "max_output_tokens": 64,
    "parameters": {},
    "stream": False,
    "arrival": "poisson",
    "seed": 0,
    "warmup": None,
    "retries": 5,
    "timeout": 60.0,
    "slo": {},
    "profile": "t5",
    "baseline": None,
    "margin": 0.2,
    "max_failed": 0,
    "output": "out",
    "resume": False,
    "tls": False,
    "ca_certificate": None,
    "authority": None,
    "keepalive": None,
    "headers": [],
    "loads": ["concurrency 8"],
}


def drawn(rows: int, seconds: float, streamed: bool = False, failed: float = 0.0, seed: int = 0) -> list[Sample]:
    """So many samples, sent evenly over so many seconds; latencies are log-normal around 0.2 s."""
    draw = random.Random(seed)
    samples = []
    for number in range(rows):
        reference = draw.choices(WORDS.split(), k=18)
        prediction = [word if draw.random() < 0.7 else draw.choice(WORDS.split()) for word in reference]
        latency = draw.lognormvariate(-1.6, 0.35)
        arrivals = [latency * (0.2 + 0.8 * part / 17) for part in range(18)] if streamed else []
        lost = draw.random() < failed
        error = draw.choice(["UNAVAILABLE: connection refused", "DEADLINE_EXCEEDED: 60 s"]) if lost else None
        fields = {"reference": " ".join(reference), "sent_s": seconds * number / rows, "arrivals_s": arrivals}
        done = {"prediction": " ".join(prediction), "output_tokens": 18}
        samples.append(sample(f"row {number}", latency, error, **fields, **({} if error else done)))
    return samples


def material(samples: Sequence[Sample], *, wall_s: float = 10.0, options: Any = None, **more: Any) -> Material:
    """A report of these samples; `more` is added to the results."""
    chosen = OPTIONS | (options or {})
    completed = [each for each in samples if each.prediction is not None]
    scored = rouge.scores([each.reference for each in completed], [str(each.prediction) for each in completed])
    scores = {each.id: of for each, of in zip(completed, scored, strict=True)}
    intervals = {name: vars(of) for name, of in rouge.intervals(scored).items()}
    found: dict[str, Any] = {"requests": figures.requests(samples) | {"resent": 0}, **figures.times(samples)}
    found["throughput"] = figures.throughput(samples, wall_s)
    if chosen["slo"]:
        found["goodput"] = figures.goodput(samples, wall_s, chosen["slo"])
    loads = []
    for number, name in enumerate(chosen["loads"]):
        mode, value = name.split()
        load = {"mode": {"concurrency": "closed", "rate": "open"}[mode], "value": float(value), "name": name}
        slower = [replace(each, latency_s=each.latency_s * (1 + 0.4 * number)) for each in samples]
        at = figures.times(slower) | {"throughput": figures.throughput(slower, wall_s / (1 + number / 2))}
        loads.append({"load": load, **found, **at, "changed": number, "kept": 0, "wall_s": wall_s})
    results = {
        "rouge": intervals | PROFILE | {"failed_as_zero": rouge.means_of(scored, len(samples))},
        **found,
        "sweep": loads,
        "model": {"name": chosen["model"], "version": "3", "manifest_sha256": "ab" * 32},
        "dataset": {"name": "test rows.jsonl", "rows": len(samples), "sha256": "cd" * 32},
        "tokenizer": {"name": "spiece.model", "sha256": "ef" * 32},
        "options": chosen,
        "formulas": figures.FORMULAS,
        "tool_version": "0.1.0",
        "python": "3.11.7",
        "started_at": "2026-11-21T10:00:00+00:00",
        "wall_s": wall_s,
    } | more
    documents = {each.id: "A long document. " + each.reference * 12 for each in samples}
    return Material(results, samples, scores, documents)


def compared(made: Material, verdict: str = "PASS", shift: float = 0.0) -> Material:
    """With a baseline that has another last word in every third row."""
    theirs = {
        each.id: each.prediction if number % 3 or each.prediction is None else each.prediction + " now"
        for number, each in enumerate(made.samples)
    }
    differing = [each.id for each in made.samples if each.prediction != theirs[each.id]]
    rows = made.results["requests"]["completed"]
    of = {"difference": 0.031 + shift, "low": -0.088 + shift, "high": 0.152 + shift, "rows_needed": None}
    needed = 12_345 if verdict == "INCONCLUSIVE" else None
    comparison = {
        "verdict": verdict,
        "margin": 0.2,
        "profile": "t5",
        "baseline": "runs/<trained>",
        "rows": rows,
        "unpaired": {"endpoint": made.results["requests"]["failed"], "baseline": 0},
        "metrics": {
            "rouge1": of,
            "rouge2": of | {"difference": -0.052 + shift, "low": -0.171 + shift, "rows_needed": needed},
            "rougeL": of | {"low": -0.26 + shift},
            "rougeLsum": of,
        },
        "failed_as_zero": dict.fromkeys(rouge.TYPES, -0.4),
        "exact_match": 1 - len(differing) / len(made.samples),
        "first_divergence": {"unit": "token", "rows": len(differing), "median": 18},
        "most_diverging": [{"id": id, "difference": -1.25, "position": 18} for id in differing[:20]],
        "notes": [],
        "speed": None,
    }
    return replace(made, results={**made.results, "comparison": comparison}, baseline=theirs)


HOSTILE = (
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' onmouseover='alert(1)",
    "line\u2028separator\u2029paragraph \u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631",
    "nul \x00 bell \x07 escape \x1b[31m carriage\rreturn delete \x7f half \ud800",
    "{{ 7 * 7 }} {% raw %} ${7*7} <!-- ]]> &lt;b&gt; &amp;",
    "unbroken" * 12_500,
    "",
    "\u200b \U0001f600 e\u0301 \ufeff",
)


def hostile() -> Material:
    """Each of HOSTILE as id, reference, prediction, error; names and options of that kind, too."""
    samples = drawn(60, 2)
    for number, text in enumerate(HOSTILE):
        samples[number] = replace(samples[number], id=f"{number} {text[:200]}", reference=text, prediction=text)
        lost = {"prediction": None, "output_ids": None, "error": f"INTERNAL: {text}"}
        samples[20 + number] = replace(samples[20 + number], **lost)
    made = material(samples, options={"model": '"><img src=x onerror=alert(1)>', "prompt": HOSTILE[0] + "{document}"})
    dataset = {**made.results["dataset"], "name": "<b>rows</b>"}
    documents = {sample.id: HOSTILE[number % len(HOSTILE)] for number, sample in enumerate(samples)}
    return replace(made, results={**made.results, "dataset": dataset}, documents=documents)
