"""Jobs, broken."""

from __future__ import annotations

from manifests.broken.words import (
    STAGE,
    UL2,
    Broken,
    container,
    environment,
    exit_codes,
    swap,
    template,
    values,
)
from manifests.built import Built
from manifests.rules import jobs


def first(built: Built, action: str, codes: list[int], operator: str = "In", **more: str) -> None:
    """A rule before all others."""
    rule = {"action": action, "onExitCodes": {"operator": operator, "values": codes, **more}}
    built.one("Job", "convert")["spec"]["podFailurePolicy"]["rules"].insert(0, rule)


BROKEN: list[Broken] = [
    (
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: exit_codes(b.one("Job", "convert")).remove(78),
        "container convert",
    ),
    (
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: exit_codes(b.one("Job", "finalize")).append(74),
        "container finalize",
    ),
    (
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: exit_codes(b.one("Job", "evaluate")).remove(3),
        "container evaluate",
    ),
    (
        jobs.disruptions_are_no_failures,
        UL2,
        lambda b: b.one("Job", "convert")["spec"]["podFailurePolicy"]["rules"].pop(0),
        "DisruptionTarget",
    ),
    (
        jobs.disruptions_are_no_failures,
        UL2,
        lambda b: b.one("Job", "finalize")["spec"]["podFailurePolicy"]["rules"].reverse(),
        "by the first rule",
    ),
    (
        jobs.parts_become_one_model,
        UL2,
        lambda b: swap(container(b, "Job", "finalize")["args"], "--name=", None),
        "destination and --name",
    ),
    (
        jobs.parts_become_one_model,
        "trtllm",
        lambda b: environment(container(b, "Job", "finalize"), "REPOSITORY").update(value="models"),
        "destination and --name",
    ),
    (
        jobs.budgets_fit,
        UL2,
        lambda b: swap(container(b, "Job", "convert")["args"], "=4GiB", "=5GiB"),
        "bytes of memory for 5GiB",
    ),
    (jobs.limits, UL2, lambda b: b.one("Job", "convert")["spec"].pop("activeDeadlineSeconds"), "activeDeadlineSeconds"),
    (
        jobs.limits,
        UL2,
        lambda b: template(b, "Job", "convert")["spec"].update(restartPolicy="OnFailure"),
        "restartPolicy Never",
    ),
    (jobs.limits, UL2, lambda b: b.one("Job", "convert")["spec"].pop("completionMode"), "completionMode Indexed"),
    (jobs.limits, UL2, lambda b: b.one("Job", "finalize")["spec"].pop("backoffLimit"), "a backoffLimit"),
    (jobs.limits, UL2, lambda b: b.one("Job", "convert")["spec"].pop("suspend"), "suspend: true"),
    (
        jobs.shards_are_completions,
        UL2,
        lambda b: b.one("Job", "convert")["spec"].update(completions=4),
        "expected ['--shard=0/4']",
    ),
    (jobs.shards_are_completions, UL2, lambda b: b.objects.remove(b.one("Job", "finalize")), "components/finalize"),
    (jobs.engines_are_where_they_are_built, "trtllm", lambda b: values(b).update(TENSOR_PARALLEL="2"), "model-tp2-pp1"),
    (jobs.failures_are_as_the_contract_says, UL2, lambda b: first(b, "Count", [65]), "65: 'Count'"),
    (jobs.failures_are_as_the_contract_says, UL2, lambda b: first(b, "Ignore", [0, 1], "NotIn"), "2: 'Ignore'"),
    (jobs.failures_are_as_the_contract_says, UL2, lambda b: first(b, "FailJob", [74]), "74: 'FailJob'"),
    (
        jobs.sources_are_there,
        "dolly-v2-3b",
        lambda b: b.one("Job", "load")["metadata"]["labels"].update({STAGE: "convert"}),
        "later stage than that of Job/load",
    ),
    (
        jobs.sources_are_there,
        "dolly-v2-3b",
        lambda b: (
            b.one("Job", "load")["metadata"]["labels"].update({STAGE: "convert"}),
            values(b).update(WEIGHTS="hub"),
        ),
        "later stage than that of Job/load",
    ),
]
