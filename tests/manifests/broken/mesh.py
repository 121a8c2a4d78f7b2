"""The mesh, broken."""

from __future__ import annotations

from functools import partial

from manifests.broken.words import UL2, Broken, template
from manifests.built import Built, Object
from manifests.rules import mesh


def before(match: Object | None, built: Built) -> None:
    """A route that comes first."""
    to_server = [{"destination": {"host": built.one("Service")["metadata"]["name"], "port": {"number": 8000}}}]
    route = {"route": to_server} | ({"match": [match]} if match else {})
    built.one("VirtualService")["spec"]["http"].insert(0, route)


def inject(built: Built, labels: dict[str, str]) -> None:
    """The overlay's own namespace says who gets a sidecar, a Job does not."""
    built.one("Namespace")["metadata"]["labels"].update(labels)
    template(built, "Job", "evaluate")["metadata"]["labels"].pop(mesh.INJECT)


BROKEN: list[Broken] = [
    (
        mesh.grpc_has_a_route,
        UL2,
        lambda b: b.one("VirtualService")["spec"]["http"].pop(0),
        "to go to a port with appProtocol grpc, found []",
    ),
    (
        mesh.grpc_has_a_route,
        UL2,
        lambda b: b.one("VirtualService")["spec"]["http"][0]["route"][0]["destination"]["port"].update(number=8000),
        "appProtocol grpc, found ['http']",
    ),
    (
        mesh.grpc_has_a_route,
        UL2,
        lambda b: b.one("Service")["spec"]["ports"][1].update(appProtocol="tcp"),
        "found ['tcp']",
    ),
    (
        mesh.gateways_encrypt,
        UL2,
        lambda b: b.one("Gateway")["spec"]["servers"][0]["port"].update(protocol="HTTP"),
        "expected HTTPS",
    ),
    (
        mesh.jobs_end,
        UL2,
        lambda b: template(b, "Job", "convert")["metadata"]["labels"].pop(mesh.INJECT),
        "it would never end",
    ),
    (
        mesh.jobs_end,
        UL2,
        lambda b: template(b, "Job", "evaluate")["metadata"]["annotations"].pop(mesh.NATIVE),
        "it would never end",
    ),
    (
        mesh.both_sides_are_in_the_mesh,
        UL2,
        lambda b: template(b)["metadata"]["labels"].update({mesh.INJECT: "false"}),
        "the same sidecar.istio.io/inject",
    ),
    (
        mesh.gateways_are_istios,
        UL2,
        lambda b: b.one("Gateway")["spec"]["selector"].update(istio="gateway"),
        "expected the selector",
    ),
    (
        mesh.gateways_lead_somewhere,
        UL2,
        lambda b: b.one("Gateway")["spec"]["servers"][0].update(hosts=["other"]),
        "for other",
    ),
    (
        mesh.gateways_lead_somewhere,
        UL2,
        lambda b: b.one("VirtualService")["spec"].pop("gateways"),
        "of this gateway for",
    ),
    *(
        (mesh.routes_are_reached, UL2, partial(before, match), mesh.GRPC)
        for match in (None, {"uri": {"prefix": "/"}}, {"uri": {"prefix": "/inference"}}, {"uri": {"regex": ".*"}})
    ),
    (mesh.jobs_end, "speculative", lambda b: inject(b, {"istio-injection": "enabled"}), "never end"),
    (mesh.jobs_end, "speculative", lambda b: inject(b, {"istio.io/rev": "stable"}), "never end"),
    (
        mesh.jobs_end,
        "speculative",
        lambda b: (
            inject(b, {}),
            template(b, "Job", "evaluate")["metadata"]["labels"].update({"istio.io/rev": "stable"}),
        ),
        "never end",
    ),
]
