"""Jobs, broken."""

from __future__ import annotations

from manifests.broken.words import UL2, Broken, exit_codes, template, values
from manifests.rules import jobs

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
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: b.one("Job", "convert")["spec"]["podFailurePolicy"]["rules"].pop(),
        "DisruptionTarget",
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
]
