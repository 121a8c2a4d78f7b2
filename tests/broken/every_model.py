"""Faults that any model may have, whatever serves it. POST is the Python model that makes text of ids."""

from __future__ import annotations

from broken.changes import (
    Case,
    again,
    append,
    both,
    edited,
    emptied,
    moved,
    no_policy,
    parameter,
    removed,
    second_version,
    text,
    written,
)

POST = "ul2_postprocessing"
PARAMETER = 'parameters { key: "%s" value { string_value: "%s" } }\n'

# fmt: off
CASES = {
    "unknown-field": Case(
        POST, text("backend:", "bakend:"), "config.pbtxt", 'in column 1.*no field named "bakend"', "bakend"
    ),
    "unfilled-number": Case(
        POST, text("versions: [1]", "versions: [${version}]"), "config.pbtxt", r"put a value for \$\{version\}", "${"
    ),
    "two-schedulers": Case(
        "gpt2", text("dynamic_batching {", "sequence_batching { }\ndynamic_batching {"), "config.pbtxt", "oneof",
        "dynamic"
    ),
    "no-text": Case(
        POST, lambda model: (model / "config.pbtxt").write_bytes(b"#\n\xff"), "config.pbtxt", "UTF-8", "\ufffd",
    ),
    "no-config": Case(
        POST, both(removed("config.pbtxt"), removed("1"), written("1/weights", "")), "config.pbtxt", "1 other files",
    ),
    "unfilled-string": Case(
        POST, parameter("a", "/x/${dir}"), "config.pbtxt", r"put a value for \$\{dir\}", 'key: "a"',
    ),
    "unfilled-engine": Case(
        "engine", parameter("gpt_model_path", "${engine_dir}"), "config.pbtxt", r"\$\{engine_dir\}",
        'key: "gpt_model_path"'
    ),
    "unfilled-ranks": Case(
        "ul2", parameter("tensor_para_size", "@@TP@@"), "config.pbtxt", "put a value for @@TP@@", "tensor_para_size"
    ),
    "meant-to-be-replaced": Case(
        "engine", parameter("gpt_model_path", "<path to engine>"), "config.pbtxt", "<path to engine>", "gpt_model_path",
        severity="warning",
    ),
    "unfilled-name": Case(POST, text(f'name: "{POST}"', 'name: "${name}"'), "config.pbtxt", "put a value", "name"),
    "unfilled-json": Case(
        "vllm", edited("1/model.json", lambda a: a.update(model="${model}")), "1/model.json", r'"model": "\$\{model\}"'
    ),
    "another-name": Case(
        POST, text(f'name: "{POST}"', 'name: "fist"'), "config.pbtxt", f"'{POST}'.*'fist'", "fist"
    ),
    "no-backend": Case("ul2", text('backend: "fastertransformer"', ""), "config.pbtxt", "a backend"),
    "input-twice": Case(POST, again("input"), "config.pbtxt", "'TOKENS_BATCH' again", 'name: "TOKENS_BATCH"'),
    "output-twice": Case(POST, again("output"), "config.pbtxt", "'OUTPUT' again", 'name: "OUTPUT"'),
    "parameter-twice": Case(
        POST, lambda model: append(model, PARAMETER % ("end_id", "7")), "config.pbtxt",
        "each key of parameters once.*'end_id' again", '"7"',
    ),
    "leading-zero": Case("gpt2", moved("1", "01"), "", "found 01|01.*1/", None),
    "no-integer-of-two-numbers": Case(POST, written("1.2/weights", ""), "1.2", "1.2.*rename it to a number"),
    "no-version-named": Case(
        POST, text("    versions: [1]\n", ""), "config.pbtxt", "versions to serve.*none", "specific",
    ),
    "no-integer": Case(POST, written("v2/weights", ""), "v2", "v2.*rename it to 2"),
    "no-version": Case("gpt2", removed("1"), "", "none"),
    "empty-version": Case("gpt2", emptied, "1/", "an empty folder"),
    "policy-misses": Case(POST, text("[1]", "[1, 3]"), "config.pbtxt", "3/.*versions 1", "[1, 3]"),
    "half-uploaded": Case(
        POST, both(second_version, no_policy), "config.pbtxt", "no policy, versions 1, 2", severity="warning",
    ),
    "latest-half-uploaded": Case(
        POST, both(second_version, text("specific {\n    versions: [1]", "latest {\n    num_versions: 1")),
        "config.pbtxt", "latest policy", "version_policy", severity="warning",
    ),
    "killed": Case(
        "ul2", both(removed("config.pbtxt"), removed("1/manifest.json"), written("1/.parts/0-of-1.jsonl", "{}")),
        "1/.parts/0-of-1.jsonl", "run its command again",
    ),
    "killed-beside": Case(
        "ul2", written("2/.parts/0-of-1.jsonl", "{}"), "2/.parts/0-of-1.jsonl", "run its command again",
        severity="warning"
    ),
}
# fmt: on
