"""Rights in the mesh, broken."""

from __future__ import annotations

from functools import partial

from manifests.broken.words import UL2, Broken
from manifests.built import Built, Object
from manifests.rules import access


def outside(built: Built) -> Object:
    """The rule about whoever comes by the gateway."""
    return built.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"][0]


def team(built: Built) -> Object:
    return built.one("AuthorizationPolicy", "server-team")


def metrics(built: Built) -> Object:
    """The rule about whoever scrapes them."""
    return built.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"][1]


def let(path: str, built: Built) -> None:
    outside(built)["to"][0]["operation"]["paths"].append(path)


BROKEN: list[Broken] = [
    (access.outside_cannot_control, UL2, lambda b: outside(b).pop("to"), "reach"),
    *(
        (access.outside_cannot_control, UL2, partial(let, path), told)
        for path, told in (
            ("*", "/v2/repository/index"),
            ("/v2/*", "/v2/models/m/trace/setting"),
            ("*/load", "/v2/repository/models/m/load"),
            ("/v2/models/{**}", "/v2/models/m/stats"),
            ("/v2/models/{*}/versions/{**}", "/v2/models/m/versions/1/trace/setting"),
            ("/v2/models/{*}/{*}", "/v2/models/m/stats"),
            ("/v2/models/{*}/stats", "/v2/models/m/stats"),
            ("/v2/{*}/status", "/v2/systemsharedmemory/status"),
        )
    ),
    (access.outside_cannot_control, UL2, lambda b: outside(b)["to"][0]["operation"].pop("notPaths"), "models/stats"),
    (access.outside_cannot_control, UL2, lambda b: outside(b)["to"][1]["operation"].pop("paths"), "ModelLoad"),
    (
        access.outside_cannot_control,
        UL2,
        lambda b: outside(b)["to"].append({"operation": {"methods": ["GET"]}}),
        "/v2/logging",
    ),
    (
        access.outside_cannot_control,
        UL2,
        lambda b: [p["spec"].update(rules=[]) for p in b.of("AuthorizationPolicy")],
        "none that allows",
    ),
    (access.outside_cannot_control, UL2, lambda b: team(b)["spec"]["rules"].append({}), "reach"),
    (access.only_known_ones_ask, UL2, lambda b: team(b)["spec"]["rules"].append({}), "anyone"),
    (
        access.only_known_ones_ask,
        UL2,
        lambda b: team(b)["spec"]["rules"][0].update({"from": [{"source": {"principals": ["*"]}}]}),
        "anyone",
    ),
    (
        access.only_known_ones_ask,
        UL2,
        lambda b: team(b)["spec"]["rules"][0].update(
            {"from": [{"source": {"principals": ["cluster.local/ns/x/sa/y"]}}]}
        ),
        "['x']",
    ),
    (
        access.only_known_ones_ask,
        UL2,
        lambda b: team(b)["spec"]["rules"][0]["from"][0]["source"].update(namespaces=["x"]),
        "expected models or istio-ingress, found ['x']",
    ),
    (
        access.only_known_ones_ask,
        UL2,
        lambda b: team(b)["spec"]["rules"][0]["from"].append({"source": {"ipBlocks": ["0.0.0.0/0"]}}),
        "anyone",
    ),
    (
        access.only_known_ones_ask,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"][1]["to"][0]["operation"].pop("paths"),
        "anyone",
    ),
    (
        access.inside_is_mutual_tls,
        UL2,
        lambda b: b.one("DestinationRule")["spec"]["trafficPolicy"].update(tls={"mode": "DISABLE"}),
        "DISABLE",
    ),
    (
        access.inside_is_mutual_tls,
        UL2,
        lambda b: b.one("DestinationRule")["spec"]["trafficPolicy"].update(
            portLevelSettings=[{"port": {"number": 8001}, "tls": {"mode": "SIMPLE"}}]
        ),
        "SIMPLE",
    ),
    (
        access.inside_is_mutual_tls,
        UL2,
        lambda b: b.one("PeerAuthentication")["spec"]["mtls"].update(mode="DISABLE"),
        "DISABLE",
    ),
    (
        access.metrics_are_let_out,
        UL2,
        lambda b: b.one("PeerAuthentication")["spec"].pop("portLevelMtls"),
        "portLevelMtls 8002",
    ),
    (
        access.metrics_are_let_out,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"].pop(),
        "8002/metrics",
    ),
    (
        access.metrics_are_let_out,
        UL2,
        lambda b: metrics(b)["to"][0]["operation"].update(paths=["/other"]),
        "8002/metrics",
    ),
    (
        access.metrics_are_let_out,
        UL2,
        lambda b: metrics(b).update({"from": [{"source": {"namespaces": ["models"]}}]}),
        "8002/metrics",
    ),
]
