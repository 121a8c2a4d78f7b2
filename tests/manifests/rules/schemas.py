"""What an API server would say of an object by itself: types, unknown fields, CEL rules.

Core kinds are those of kubernetes-validate, strict. Custom ones are in schemas/, whose README says how they were made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

try:
    import cel
except ModuleNotFoundError:  # setup.cfg: there is none for Python 3.10
    cel = None

from manifests.built import Built, Object, name

VERSION = "1.33"  # of Kubernetes: backoffLimitPerIndex is stable from here on
SCHEMAS = Path(__file__).parent.parent / "schemas"
# kubernetes/kubernetes, staging/src/k8s.io/apimachinery/pkg/util/validation/validation.go: IsDNS1035Label,
# IsDNS1123Subdomain, IsValidPortName. Pods of a Job have its name as a label, which are no longer than 63.
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
PORT = re.compile(r"(?=.{1,15}$)(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LONGEST = {"Service": 63, "Job": 63, "Namespace": 63}
CORE = {"", "apps", "batch", "autoscaling", "policy", "rbac.authorization.k8s.io", "scheduling.k8s.io"}  # groups


def _file(found: Object) -> Path:
    group, _, version = found["apiVersion"].rpartition("/")
    return SCHEMAS / f"{group}_{found['kind'].lower()}_{version}.json"


@cache
def _schema(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text())


@cache
def _validator(path: Path) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_schema(path))


@cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


def core(found: Object) -> Iterator[str]:
    try:
        kubernetes_validate.validate(found, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{name(found)}: {'.'.join(map(str, error.path))}: {error.message}"


def custom(found: Object) -> Iterator[str]:
    """Against its JSON Schema, then the schema's CEL rules."""
    path = _file(found)
    if not path.exists():
        yield f"{name(found)}: expected schemas/{path.name}, found none: copy it there, or mistyped kind or version"
        return
    for error in _validator(path).iter_errors(found):
        yield f"{name(found)}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
    yield from (f"{name(found)}: {told}" for told in rules(found, _schema(path), _schema(path)))


def rules(value: Any, schema: Mapping[str, Any], whole: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Every CEL rule below a schema, of the part of the value that it is about. Those on changes are left out."""
    while "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    for rule in schema.get("x-kubernetes-validations", ()) if cel else ():
        if "oldSelf" in rule["rule"]:
            continue
        try:
            held = _program(rule["rule"]).execute({"self": value})
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            yield f"{at}: {rule['rule']}: {error}"
            continue
        if not held:
            yield f"{at}: {rule.get('message', rule['rule'])}"
    if isinstance(value, Mapping):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for key, part in value.items():
            if inner := properties.get(key, rest if isinstance(rest, Mapping) else None):
                yield from rules(part, inner, whole, f"{at}.{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for number, part in enumerate(value):
            yield from rules(part, schema["items"], whole, f"{at}[{number}]")


def names_are_allowed(built: Built) -> Iterator[str]:
    """Lower case (RFC 1123), and of ports 15 characters with a letter (RFC 6335)."""
    for found in built.objects:
        if found["apiVersion"].startswith("rbac."):  # may be called anything
            continue
        called, pattern = found["metadata"]["name"], DNS_LABEL if found["kind"] == "Service" else DNS_SUBDOMAIN
        if not pattern.fullmatch(called) or len(called) > LONGEST.get(found["kind"], 253):
            yield f"{name(found)}: expected a name of lower-case letters, digits and hyphens, not too long"
    for pod in built.pods:
        for port in (port for container in pod.containers for port in container.get("ports", [])):
            if not PORT.fullmatch(port.get("name", "a")):
                yield f"{pod.where()} expected a port's name of up to 15 a-z, 0-9 and single hyphens, found {port}"


def objects_are_valid(built: Built) -> Iterator[str]:
    for found in built.objects:
        group = found["apiVersion"].rpartition("/")[0]
        yield from core(found) if group in CORE else custom(found)


RULES = (names_are_allowed, objects_are_valid)
