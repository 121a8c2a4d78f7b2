"""Types, fields, CEL, broken."""

from __future__ import annotations

from manifests.broken.words import RAY, UL2, Broken
from manifests.rules import schemas

BROKEN: list[Broken] = [
    (schemas.objects_are_valid, UL2, lambda b: b.one("Deployment")["spec"].update(replica=2), "replica"),
    (
        schemas.objects_are_valid,
        UL2,
        lambda b: b.one("Job", "convert")["spec"].update(completions="eight"),
        "completions",
    ),
    (schemas.objects_are_valid, UL2, lambda b: b.one("Gateway")["spec"]["servers"][0].update(tlss={}), "tlss"),
    (schemas.objects_are_valid, UL2, lambda b: b.one("Gateway").update(kind="Gatway"), "expected schemas/"),
    (
        schemas.objects_are_valid,
        UL2,
        lambda b: b.one("VirtualService")["spec"]["http"][0].update(timeout="0s"),
        "duration",
    ),
    (schemas.objects_are_valid, RAY, lambda b: b.one("RayService")["spec"].update(serveConfig="x"), "serveConfig"),
]
