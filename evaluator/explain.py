"""What a failed call means for people behind an ingress, and how to mend it.

    status, message ─> the first row that fits ─> one line

The patterns are what grpc.aio, aiohttp, Triton, Envoy and Istio really say; the tests provoke it. Statuses are gRPC's,
and those of evaluator/protocols/http.py.
"""

import re
from typing import NamedTuple


class Row(NamedTuple):
    """Patterns of the whole status and of a part of the message, in any case; and what to do."""

    status: str
    message: str
    mend: str


ANY = ".*"
ROWS = (
    # TLS. gRPC reports all of it as UNAVAILABLE.
    Row(
        ANY,
        "hostname mismatch|IP address mismatch|hostname verification check failed",
        "the server's certificate is of another name: give --endpoint that name, or --authority the name where the "
        "endpoint is an address",
    ),
    Row(
        ANY,
        "certificate has expired|certificate is not yet valid",
        "renew the server's certificate; is the clock right?",
    ),
    Row(
        ANY,
        "certificate.verify.failed|unable to get local issuer|self.signed certificate|certificate signature failure",
        "--ca-certificate with the PEM file of the authority that issued the server's certificate (often ca.crt of the "
        "ingress's secret)",
    ),
    Row(
        ANY,
        "wrong.version.number",
        "the server speaks no TLS at this port: leave --tls out (in a URL http://), or use its TLS port",
    ),
    Row(
        "HTTP 400",
        "plain HTTP request was sent to HTTPS|client sent an HTTP request to an HTTPS",
        "the port wants TLS: write https:// in --endpoint",
    ),
    # one protocol's client at the other's port
    Row(
        ANY,
        "http1.x server|expected SETTINGS frame",
        "this port speaks HTTP/1: give Triton's gRPC port (usually 8001; 8000 is HTTP, 8002 metrics), or a URL for "
        "--protocol http",
    ),
    Row(
        ANY,
        "missing selected ALPN",
        "this TLS port offers no HTTP/2: let the ingress offer h2 (ALPN) for gRPC, or give a URL for --protocol http",
    ),
    Row(
        "MALFORMED_RESPONSE",
        r"bad status line.*\\+x00\\+x00",
        "this is a gRPC port: give it as HOST:PORT, without http://, or the HTTP port (Triton: usually 8000)",
    ),
    # Triton
    Row(
        ANY,
        "decoupled transaction policy|produce exactly 1 response",
        "the model answers with a stream: --stream over HTTP; over gRPC it was another one when this began, run again",
    ),
    Row(
        "NOT_FOUND|HTTP 404",
        "unknown model|model not found|is not found|does not exist",
        "check --model and whether its version is still served: a new version may have replaced it during the run",
    ),
    # routes
    Row(
        "UNIMPLEMENTED",
        r"status: 404|^(UNIMPLEMENTED: )?(\(no message\))?$",
        "no route for gRPC: does a VirtualService, HTTPRoute or Ingress match this host (--authority) and "
        "/inference.GRPCInferenceService/, and is its port declared as gRPC?",
    ),
    Row(
        "UNIMPLEMENTED",
        ANY,
        "a gRPC server, but none that has KServe's inference service: is this the port of Triton?",
    ),
    Row(
        "UNKNOWN|HTTP 30[1278]",
        "status: 30[1278]|moved",
        "the ingress sends on to another address, usually to https: --tls with its TLS port, or https:// in --endpoint",
    ),
    Row(
        "HTTP 404",
        ANY,
        "nothing is served at this path: does the route match host (--authority) and path, is --protocol right, has "
        "the server the model?",
    ),
    Row(
        "UNKNOWN|HTTP 405",
        r"(?<![:\d])405\b",
        "what answers there takes no such call: check the path of --endpoint, --authority and --protocol",
    ),
    Row(
        "UNKNOWN|HTTP 421",
        "status: 421|HTTP 421|misdirected",
        "the proxy has no such host on this connection: --authority with the name of its route",
    ),
    # who may call
    Row(
        "UNAUTHENTICATED|HTTP 401",
        ANY,
        "give a token that is still valid: --token-file, the variable EVALUATE_TOKEN, or --header",
    ),
    Row(
        "PERMISSION_DENIED|HTTP 403",
        "RBAC",
        "an AuthorizationPolicy of the mesh refuses this caller: allow its service account or path, or give a token "
        "(--token-file)",
    ),
    Row(
        "PERMISSION_DENIED|HTTP 403",
        ANY,
        "the caller is known, but may not do this: give its account the right to, or another token",
    ),
    # load and size
    Row(
        "RESOURCE_EXHAUSTED|UNKNOWN|HTTP 413",
        r"larger than max|(?<![:\d])413\b",
        "the request is larger than the server or a proxy takes: raise that limit, or lower --max-input-tokens",
    ),
    Row(
        "RESOURCE_EXHAUSTED",
        ANY,
        "a limit or quota of the server is used up: lower --concurrency or --rate, or raise it",
    ),
    Row(
        "UNAVAILABLE",
        r"(?<![:\d])429\b",
        "the server or a rate limit of the mesh asks for fewer requests: lower --concurrency or --rate",
    ),
    Row("HTTP 411", ANY, "a proxy wants the length of a request, which another one takes away: look at the proxies"),
    Row(
        "DEADLINE_EXCEEDED",
        ANY,
        "the server needs longer, or a proxy holds the answer back: raise --timeout, or lower --concurrency or --rate",
    ),
    # the way to the server
    Row(
        "UNAVAILABLE",
        "no healthy upstream",
        "the route is right, but no pod behind it is ready: kubectl get pods, and get endpointslices of the service",
    ),
    Row(
        "UNAVAILABLE",
        "upstream connect error|reset reason",
        "the proxy cannot connect to the pod: check the service's targetPort and protocol (appProtocol, port name) "
        "and the TLS mode of its DestinationRule",
    ),
    Row(
        "UNAVAILABLE",
        "hostname lookup error|name or service not known|name resolution|nodename nor servname|no address associated",
        "this name cannot be resolved here: check it, and whether it is only known within the cluster",
    ),
    Row(
        "UNAVAILABLE",
        "connection refused|connect call failed",
        "nothing listens there: check host and port, whether the server runs, and kubectl port-forward, if it is used",
    ),
    Row(
        "UNAVAILABLE",
        "socket closed|reset by peer|server disconnected|connection was lost",
        "the server ended the connection: it went down, or wants TLS (--tls, https://) as a mesh with strict mTLS does",
    ),
    Row(
        "UNAVAILABLE",
        "ping timeout|timed out",
        "nothing comes back on the connection: the server hangs or the network has lost it, look at its pod",
    ),
    Row(
        "UNAVAILABLE",
        r"(?<![:\d])50[234]\b",
        "a proxy cannot reach the server, or not in time: kubectl get pods, and the time limit of the route",
    ),
    Row(
        "INTERNAL",
        "status: 400",
        "a proxy on the way does not take it as gRPC: declare the port as such (name grpc-..., or appProtocol)",
    ),
    Row("INTERNAL|HTTP 500", ANY, "the server failed at this request: its log says more"),
)


def explain(status: str, message: str) -> str | None:
    """One line of mend for a failed call; None where nothing is known."""
    for row in ROWS:
        if re.fullmatch(row.status, status) and re.search(row.message, message, re.IGNORECASE | re.DOTALL):
            return row.mend
    return None


def mend_of(error: str) -> str | None:
    """The same of `STATUS: message`, as samples.jsonl has it."""
    status, _, message = error.partition(": ")
    return explain(status, message)
