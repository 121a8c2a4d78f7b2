"""What tables of broken overlays are written in: a rule, an overlay, how it is broken in one place, what is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from manifests import built as builds
from manifests.built import Built, Object

Break = Callable[[Built], object]
Broken = tuple[Callable[[Built], Any], str, Break, str]  # rule, overlay, what is broken, what is told

UL2 = "ul2-20b-1xa100"
VLLM = "gemma-2-9b-lora"
RAY = "vicuna-13b"
INSTANCE = "app.kubernetes.io/instance"
STAGE = "app.kubernetes.io/component"


@cache
def overlay(name: str) -> Built:
    return builds.build(next(folder for folder in builds.overlays() if folder.name == name))


def container(built: Built, kind: str = "Deployment", named: str = "server") -> Object:
    return built.one(kind, named)["spec"]["template"]["spec"]["containers"][0]


def template(built: Built, kind: str = "Deployment", named: str = "server") -> Object:
    return built.one(kind, named)["spec"]["template"]


def ray(built: Built, group: str) -> builds.Pod:
    """The pod of Ray's head, or of its worker."""
    return [pod for pod in built.pods if pod.owner["kind"] == "RayService"][group == "Worker"]


def values(built: Built) -> dict[str, str]:
    return built.one("ConfigMap")["data"]


def swap(items: list[Any], before: str, after: str | None) -> None:
    """A text among others: another one in its place, or none."""
    place = next(number for number, item in enumerate(items) if before in item)
    items[place : place + 1] = [] if after is None else [items[place].replace(before, after)]


def environment(found: Object, name: str) -> Object:
    return next(entry for entry in found["env"] if entry["name"] == name)


def exit_codes(job: Object) -> list[int]:
    rules = job["spec"]["podFailurePolicy"]["rules"]
    return next(rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule)
