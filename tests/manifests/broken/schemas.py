"""Types, fields, CEL, names, broken."""

from __future__ import annotations

from functools import partial

from manifests.broken.words import RAY, UL2, Broken, container
from manifests.built import Built
from manifests.rules import schemas


def rename(kind: str, called: str, built: Built) -> None:
    built.one(kind)["metadata"]["name"] = called


def without_end(built: Built) -> None:
    built.one("VirtualService")["spec"]["http"][0].update(timeout="0s")


def call(port: str, built: Built) -> None:
    container(built)["ports"][0]["name"] = port


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
    *([(schemas.objects_are_valid, UL2, without_end, "duration")] if schemas.cel else []),  # a rule of CEL
    (schemas.objects_are_valid, RAY, lambda b: b.one("RayService")["spec"].update(serveConfig="x"), "serveConfig"),
    *(
        (schemas.names_are_allowed, UL2, partial(rename, kind, bad), bad)
        for kind, bad in (
            ("Deployment", "Server"),
            ("ConfigMap", "con_fig"),
            ("Service", "8-servers"),
            ("Service", "a.b"),
            ("Job", "a" * 64),
            ("Gateway", "-x"),
        )
    ),
    *(
        (schemas.names_are_allowed, UL2, partial(call, bad), "a port's name")
        for bad in ("inference-of-grpc", "http_port", "8000", "a--b", "Http")
    ),
]
