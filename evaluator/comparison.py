"""Whether an endpoint's answers are as good as others to the same rows: PASS, FAIL or INCONCLUSIVE.

rows, answers ─┐
               ├─ ROUGE of each pair ─> differences ─> interval of their mean ─> verdict   (verdict.py)
baseline ──────┤
               └─ token by token ─> exact matches, where the others part, which part most
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evaluator import bucket, rouge, verdict
from evaluator.baselines import Baseline, load_baseline
from evaluator.errors import DatasetError, UsageError

FEWEST = 50  # pairs below which nothing is judged: from there on wrong verdicts were simulated
DIVERGING_SHOWN = 20  # rows
IDS_SHOWN = 5  # in a message
SPEED = ("latency_s", "time_to_first_token_s", "time_per_output_token_s", "inter_token_latency_s", "throughput")


@dataclass(frozen=True)
class Difference:
    """Of one metric, endpoint minus baseline, in points. `rows_needed` where the interval holds -margin, else None."""

    difference: float | None
    low: float | None
    high: float | None
    rows_needed: int | None


@dataclass(frozen=True)
class Diverging:
    """A pair that differs, by how much (mean of the judged metrics), and from which token, or word, on."""

    id: str
    difference: float
    position: int


@dataclass(frozen=True)
class Comparison:
    """What results.json has as `comparison`.

    `rows` counts pairs; `unpaired` the evaluated rows to which the endpoint, or the baseline, has no answer (a row may
    be in both). `failed_as_zero` is the difference over all rows that the baseline answered, the endpoint's failures as
    0. `exact_match` is the share of pairs with the same token ids, or the same text where one side has no ids.
    `first_divergence`: of the others, how many there are and the median position at which they part, in `unit`s
    (tokens; words where not every pair has ids). `most_diverging` begins with the largest difference, up or down.
    `speed` is there when two folders are compared: figure -> {baseline, endpoint, ratio}.
    """

    verdict: str
    margin: float
    profile: str
    baseline: str
    rows: int
    unpaired: Mapping[str, int]
    metrics: Mapping[str, Difference]
    failed_as_zero: Mapping[str, float | None]
    exact_match: float | None
    first_divergence: Mapping[str, Any]
    most_diverging: Sequence[Diverging]
    notes: Sequence[str]
    speed: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


@dataclass(frozen=True)
class _Pair:
    """Both answers to a row, and their token ids where there are any; both scores, one value per rouge.TYPES."""

    id: str
    texts: tuple[str, str]
    ids: tuple[Sequence[int] | None, Sequence[int] | None]
    scores: tuple[rouge.Scores, rouge.Scores]

    @property
    def equal(self) -> bool:
        ours, theirs = self.ids
        return self.texts[0] == self.texts[1] if ours is None or theirs is None else list(ours) == list(theirs)

    def position(self, tokens: bool) -> int:
        ours, theirs = self.ids if tokens else [text.split() for text in self.texts]
        assert ours is not None
        assert theirs is not None
        parts = (i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
        return next(parts, min(len(ours), len(theirs)))

    def difference(self) -> float:
        ours, theirs = self.scores
        return math.fsum(ours[i] - theirs[i] for i in map(rouge.TYPES.index, rouge.JUDGED)) / len(rouge.JUDGED)


def compare(
    rows: Sequence[tuple[str, str]],
    predictions: Sequence[str | None],
    baseline: Baseline,
    profile: str = rouge.PROFILE,
    margin: float = verdict.MARGIN,
    output_ids: Sequence[Sequence[int] | None] | None = None,
) -> Comparison:
    """Judge an endpoint. Both sides are scored here, alike.

    Args:
        rows: (id, reference) of each evaluated row.
        predictions: the endpoint's answer to each, None where it failed.
        baseline: answers to the same rows; it may have more.
        profile: of ROUGE.
        margin: points that may be lost.
        output_ids: the endpoint's token ids of each row, where there are any.

    Raises:
        DatasetError: the baseline lacks rows, or has other references for them.
    """
    require_rows(rows, baseline)
    theirs = [baseline.predictions[identity] for identity, _ in rows]
    our_ids = output_ids or [None] * len(rows)
    our_scores, their_scores = _scores(rows, predictions, profile), _scores(rows, theirs, profile)
    pairs = [
        _Pair(rows[i][0], (ours, other), (our_ids[i], baseline.output_ids.get(rows[i][0])), (score, their_score))
        for i, (ours, other) in enumerate(zip(predictions, theirs, strict=True))
        if ours is not None and other is not None
        if (score := our_scores[i]) and (their_score := their_scores[i])
    ]
    metrics = _metrics(pairs, margin)
    judged = [(metrics[name].low, metrics[name].high) for name in rouge.JUDGED]
    known = [(low, high) for low, high in judged if low is not None and high is not None]
    few = len(pairs) < FEWEST
    tokens = all(None not in pair.ids for pair in pairs)
    parted = [(pair, pair.position(tokens)) for pair in pairs if not pair.equal]
    parted.sort(key=lambda found: (-abs(found[0].difference()), found[1], found[0].id))
    return Comparison(
        verdict=verdict.INCONCLUSIVE if few else verdict.judge(known, margin),
        margin=margin,
        profile=profile,
        baseline=baseline.name,
        rows=len(pairs),
        unpaired={"endpoint": sum(text is None for text in predictions), "baseline": theirs.count(None)},
        metrics=metrics,
        failed_as_zero=_failed_as_zero(our_scores, their_scores),
        exact_match=1 - len(parted) / len(pairs) if pairs else None,
        first_divergence={
            "unit": "token" if tokens else "word",
            "rows": len(parted),
            "median": _median([position for _, position in parted]),
        },
        most_diverging=[Diverging(pair.id, pair.difference(), position) for pair, position in parted[:DIVERGING_SHOWN]],
        notes=_notes(pairs, few),
    )


def compare_folders(a: str, b: str, margin: float = verdict.MARGIN) -> Comparison:
    """Judge the run in folder B with the run in folder A as its baseline, with B's ROUGE profile, and compare speeds.

    Raises:
        UsageError: one of them is no folder.
        DatasetError: they are runs over different rows, or no results.
        NotFoundError, TransientError, OptionsError: as `load_baseline`.
    """
    for path in (a, b):
        if path.endswith(".jsonl") if bucket.is_one(path) else Path(path).is_file():
            raise UsageError(f"compare: expected two folders of finished `evaluate` runs, found the file {path}")
    before, after = load_baseline(a, "compare"), load_baseline(b, "compare")
    rows = {run.name: _stated(run, "dataset", "rows_sha256") for run in (before, after)}
    if len(set(rows.values())) > 1:
        raise DatasetError(
            "\n  ".join(
                [
                    "compare: expected two runs over the same rows, found different ones",
                    *(f"{name}: rows_sha256 {digest}" for name, digest in rows.items()),
                    "mend: evaluate both with the same --dataset, --limit and --shuffle",
                ]
            )
        )
    lacking = [identity for identity in after.predictions if identity not in after.references]
    if lacking:
        raise DatasetError(f"{b}/samples.jsonl: expected a reference on each line, found none for {_some(lacking)}")
    found = compare(
        [(identity, after.references[identity]) for identity in after.predictions],
        list(after.predictions.values()),
        before,
        _stated(after, "rouge", "profile"),
        margin,
        [after.output_ids.get(identity) for identity in after.predictions],
    )
    return replace(found, speed=speed(before.results or {}, after.results or {}))


def speed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Section -> figure -> {baseline, endpoint, ratio} of two results.json, for what both have; ratio None over 0."""
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for section in SPEED:
        old, new = before.get(section), after.get(section)
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue
        figures = {key: (old[key], new[key]) for key in old if _number(old[key]) and _number(new.get(key))}
        table[section] = {
            key: {"baseline": one, "endpoint": other, "ratio": other / one if one else None}
            for key, (one, other) in figures.items()
        }
    return table


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stated(run: Baseline, section: str, key: str) -> str:
    """A text that results.json has to hold."""
    found = (run.results or {}).get(section)
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, str) or (key == "profile" and value not in rouge.PROFILES):
        raise DatasetError(
            f"{run.name}/results.json: expected {section}.{key}, found {value!r}\n"
            "  mend: evaluate again with this version"
        )
    return value


def require_rows(rows: Sequence[tuple[str, str]], baseline: Baseline) -> None:
    """Raise DatasetError unless the baseline has an answer, if only null, to each (id, reference), and no other one."""
    lacking = [identity for identity, _ in rows if identity not in baseline.predictions]
    if lacking:
        raise DatasetError(
            f"{baseline.name}: expected an answer to each of the {len(rows)} rows, "
            f"found none to {len(lacking)} of them: {_some(lacking)}\n"
            "  mend: make the baseline of the same data set; null is an answer that failed"
        )
    other = [identity for identity, reference in rows if baseline.references.get(identity, reference) != reference]
    if other:
        raise DatasetError(
            f"{baseline.name}: expected the references of the data set, found others for {len(other)} of {len(rows)} "
            f"rows: {_some(other)}\n  mend: make the baseline of the same data set"
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:IDS_SHOWN])) + (", ..." if len(ids) > IDS_SHOWN else "")


def _scores(
    rows: Sequence[tuple[str, str]], predictions: Sequence[str | None], profile: str
) -> list[rouge.Scores | None]:
    """Of each row; None where there is no answer."""
    answered = [(reference, text) for (_, reference), text in zip(rows, predictions, strict=True) if text is not None]
    scored = iter(rouge.scores([reference for reference, _ in answered], [text for _, text in answered], profile))
    return [None if text is None else next(scored) for text in predictions]


def _metrics(pairs: Sequence[_Pair], margin: float) -> dict[str, Difference]:
    if not pairs:
        return {name: Difference(None, None, None, None) for name in rouge.TYPES}
    import numpy as np

    ours, theirs = (np.asarray([pair.scores[side] for pair in pairs]) for side in (0, 1))
    differences, worst = ours - theirs, verdict.worst_loss(theirs)
    low, high = verdict.interval(differences, worst)
    deviations = differences.std(axis=0)
    found = {}
    for i, name in enumerate(rouge.TYPES):
        mean = math.fsum(differences[:, i]) / len(pairs)
        decided = low[i] >= -margin or high[i] < -margin
        needed = None if decided else verdict.rows_needed(mean, float(deviations[i]), float(worst[i]), margin)
        found[name] = Difference(mean, float(low[i]), float(high[i]), needed)
    return found


def _failed_as_zero(
    ours: Sequence[rouge.Scores | None], theirs: Sequence[rouge.Scores | None]
) -> dict[str, float | None]:
    nothing = (0.0,) * len(rouge.TYPES)
    both = [(one or nothing, other) for one, other in zip(ours, theirs, strict=True) if other is not None]
    return {
        name: math.fsum(one[i] - other[i] for one, other in both) / len(both) if both else None
        for i, name in enumerate(rouge.TYPES)
    }


def _notes(pairs: Sequence[_Pair], few: bool) -> list[str]:
    notes = []
    if few:
        notes.append(f"not judged: {len(pairs)} rows have both answers, at least {FEWEST} are needed")
    if pairs and all(pair.scores[0] == pair.scores[1] for pair in pairs):
        # (1 - p)^n = 5 % at p = 3/n, nearly
        share = 300 / len(pairs)
        notes.append(f"no score differs in {len(pairs)} rows; of all rows up to {share:.2g} % may still differ (95 %)")
    return notes


def _median(positions: Sequence[int]) -> float | None:
    ordered, half = sorted(positions), len(positions) // 2
    if not ordered:
        return None
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
