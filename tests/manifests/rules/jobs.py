"""Jobs: what is tried again, what is not, and for how long."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from manifests.built import Built, Object, Pod, expand, name
from manifests.rules.commands import words
from manifests.rules.pods import GIVEN
from manifests.rules.references import STAGES, at

# Exit codes that no retry mends (README, "Exit codes"): wrong usage, source, missing, occupied, options. A verdict, or
# too many failed requests, are results of `evaluate`.
NEVER = {
    "ftconvert": (2, 65, 66, 73, 78),
    "evaluate": (1, 2, 3, 4, 65, 66, 73, 78),
}


def _program(container: Object) -> str:
    return container.get("command", [""])[0]


def _action(job: Object, container: str, code: int) -> str:
    """What becomes of an exit code: the first rule that matches decides (batch/v1, PodFailurePolicy: "in order")."""
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", []):
        codes = rule.get("onExitCodes")
        about = codes and codes.get("containerName", container) == container
        if about and (code in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
    return "Count"


def failures_are_as_the_contract_says(built: Built) -> Iterator[str]:
    """For each container of ours: its codes end the Job, others count."""
    for job in built.of("Job"):
        for container in Pod(job, job["spec"]["template"]).containers:
            if codes := NEVER.get(_program(container)):
                actions = {code: _action(job, container["name"], code) for code in range(1, 256)}
                wrong = {x: found for x, found in actions.items() if found != ("FailJob" if x in codes else "Count")}
                if wrong:
                    told = f"FailJob at {codes} alone for container {container['name']}"
                    yield f"{name(job)}: expected {told}, found {dict(list(wrong.items())[:9])}"


def disruptions_are_no_failures(built: Built) -> Iterator[str]:
    """A node that goes away (Spot, drained) uses up no retry, whatever a pod said when it was stopped.

    The first rule that matches decides, so this one stands before those of exit codes.
    """
    for job in built.of("Job"):
        rules = job["spec"].get("podFailurePolicy", {}).get("rules", [])
        disrupted = [rule["action"] for rule in rules if "DisruptionTarget" in at(rule, "onPodConditions.type")]
        first = rules[:1] and at(rules[0], "onPodConditions.type")
        if disrupted[:1] != ["Ignore"] or "DisruptionTarget" not in first:
            yield f"{name(job)}: expected DisruptionTarget to be ignored by the first rule, found {disrupted}"


def limits(built: Built) -> Iterator[str]:
    """A Job ends, is cleared away, and leaves retries to its controller: what an API server asks beside."""
    for job in built.of("Job"):
        spec = job["spec"]
        for key in ("activeDeadlineSeconds", "ttlSecondsAfterFinished"):
            if key not in spec:
                yield f"{name(job)}: expected {key}, found none"
        if spec["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{name(job)}: expected restartPolicy Never, without which there is no podFailurePolicy"
        if "backoffLimitPerIndex" in spec and spec.get("completionMode") != "Indexed":
            yield f"{name(job)}: expected completionMode Indexed beside backoffLimitPerIndex"
        if "backoffLimitPerIndex" not in spec and "backoffLimit" not in spec:
            yield f"{name(job)}: expected a backoffLimit, found none"
        if "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {}) and not spec.get("suspend"):
            yield f"{name(job)}: expected suspend: true beside a queue"


def shards_are_completions(built: Built) -> Iterator[str]:
    """`--shard I/N` and completions say the same N, and more than one part is put together by a Job."""
    for job in built.of("Job"):
        for container in job["spec"]["template"]["spec"]["containers"]:
            values = built.values(container) | GIVEN
            shards = [expand(arg, values) for arg in container.get("args", []) if arg.startswith("--shard")]
            expected = [f"--shard=0/{job['spec'].get('completions', 1)}"]
            if shards and (shards != expected or job["spec"].get("completionMode") != "Indexed"):
                yield f"{name(job)}: expected {expected} of an Indexed Job, found {shards}"
            merged = any(
                "finalize" in x.get("args", [])
                for y in built.of("Job")
                for x in y["spec"]["template"]["spec"]["containers"]
            )
            if shards and merged != (job["spec"].get("completions", 1) > 1):
                yield f"{name(job)}: expected components/finalize where there are several parts, and only then"


def parts_become_one_model(built: Built) -> Iterator[str]:
    """`finalize` is given destination and --name of the parts, or it may take another model for theirs."""
    ours = [(pod.owner, words(built, found)) for pod in built.pods for found in pod.containers]
    given = [(name(job), told[1:2], told[-1:], [x for x in told if x.startswith("--name=")]) for job, told in ours]
    parts = [where for _, does, *where in given if does and "-to-" in does[0]]
    for job, does, *where in given:
        if does == ["finalize"] and where not in parts:
            yield f"{job}: expected destination and --name of a conversion, one of {parts}, found {where}"


UNITS = {"Mi": 1 << 20, "Gi": 1 << 30, "MiB": 1 << 20, "GiB": 1 << 30}


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([MG]iB?)", text).groups()  # type: ignore[union-attr] # another unit is an error
    return int(number) * UNITS[unit]


def budgets_fit(built: Built) -> Iterator[str]:
    """A conversion takes at most 1.25 times its budget (docs/performance.md), and a GiB of room beside."""
    for pod in built.pods:
        for container in pod.containers:
            for budget in (word.partition("=")[2] for word in words(built, container) if "--memory-budget=" in word):
                needed, limit = 1.25 * _bytes(budget) + (1 << 30), container["resources"]["limits"]["memory"]
                if _bytes(limit) < needed:
                    yield f"{pod.where(container)} expected {needed:,.0f} bytes of memory for {budget}, found {limit}"


def engines_are_where_they_are_built(built: Built) -> Iterator[str]:
    """The commands in manifest.json write beside the checkpoint (trtllm_build.py); ENGINE says where."""
    for pod in (pod for pod in built.pods if pod.labels.get("app.kubernetes.io/component") == "build"):
        values = built.values(pod.spec["containers"][0])
        name_of_it = f"{values.get('NAME')}-tp{values.get('TENSOR_PARALLEL')}-pp1"  # base/convert has no pipelines
        expected = posixpath.normpath(f"{values.get('CHECKPOINT')}/../engines/{name_of_it}")
        if values.get("ENGINE") != expected:
            yield f"{pod.where()} expected ENGINE={expected} in configs.env, found {values.get('ENGINE')}"


def _stage(job: Object) -> int:
    stage = job["metadata"].get("labels", {}).get("app.kubernetes.io/component")
    return STAGES.index(stage) if stage in STAGES else 0


def sources_are_there(built: Built) -> Iterator[str]:
    """Jobs of one stage run at the same time: what one writes is a source for later stages alone."""
    found = [
        (job, given[-2], given[-1])
        for job in built.of("Job")
        for container in Pod(job, job["spec"]["template"]).containers
        if re.match(r"ftconvert \w+-to-\w+ ", " ".join(given := words(built, container)))
    ]
    for reader, source, _ in found:
        for writer, _, destination in found:
            inside = f"{source}/".startswith(f"{destination.rstrip('/')}/")
            if inside and _stage(writer) >= _stage(reader):
                yield f"{name(reader)}: expected a later stage than that of {name(writer)}, which writes {source}"


RULES = (
    budgets_fit,
    disruptions_are_no_failures,
    engines_are_where_they_are_built,
    failures_are_as_the_contract_says,
    limits,
    parts_become_one_model,
    shards_are_completions,
    sources_are_there,
)
