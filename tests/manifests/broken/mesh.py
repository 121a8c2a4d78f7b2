"""The mesh, broken."""

from __future__ import annotations

from manifests.broken.words import UL2, Broken, template
from manifests.rules import mesh

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
        mesh.gateways_encrypt,
        UL2,
        lambda b: b.one("Gateway")["spec"]["servers"][0].update(hosts=["other"]),
        "VirtualService for other",
    ),
    (
        mesh.outside_cannot_control,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"][0].pop("to"),
        "found all",
    ),
    (
        mesh.outside_cannot_control,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"][0]["to"][0]["operation"].update(
            paths=["/v2/*"]
        ),
        "found ['/v2/*']",
    ),
    (
        mesh.outside_cannot_control,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-team")["spec"]["rules"][0]["from"][0]["source"].update(
            namespaces=["x"]
        ),
        "expected models or istio-ingress",
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
]
