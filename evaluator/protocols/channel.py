"""A gRPC channel as the options say: TLS, virtual host, keepalive, and what every call carries."""

import ssl
from pathlib import Path
from typing import Any

from evaluator.protocols.base import Connection
from evaluator.protocols.trust import trusted

UNLIMITED = -1
KEEPALIVE_TIMEOUT_MS = 20_000  # gRPC's own: without an answer for so long the connection counts as lost


def grpc_channel(connection: Connection) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """A grpc.aio.Channel, which connects when it is first used, and the metadata to give to every call on it.

    An interceptor would add the metadata by itself, and a tenth of a millisecond to every request.

    Raises:
        NotFoundError, OptionsError: the file of --ca-certificate is missing, or holds no certificates.
    """
    import grpc

    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", UNLIMITED),
        ("grpc.enable_retries", 0),  # a request that is sent again is counted as such
    ]
    if connection.authority:
        options.append(("grpc.default_authority", connection.authority))
    if connection.keepalive_s is not None:
        options.append(("grpc.keepalive_time_ms", max(1, round(connection.keepalive_s * 1000))))
        # In grpcio 1.85 the second is what counts where nothing comes back; its default is a minute.
        options.append(("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS))
        options.append(("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS))
    # HTTP/2 has header names in lower case only, and gRPC refuses others.
    metadata = tuple((name.lower(), value) for name, value in connection.headers.items())
    if not connection.tls:
        return grpc.aio.insecure_channel(connection.endpoint, options=options), metadata
    credentials = grpc.ssl_channel_credentials(root_certificates=_roots(connection.ca_certificate))
    return grpc.aio.secure_channel(connection.endpoint, credentials, options=options), metadata


def _roots(ca_certificate: str | None) -> bytes | None:
    """The PEM of the authorities to trust: of the file, else the system's; None, gRPC's own list, where it has none.

    gRPC takes a file without certificates, and then fails every handshake without a reason: so it is read here.
    """
    if ca_certificate is None:
        system = ssl.get_default_verify_paths().cafile
        return Path(system).read_bytes() if system else None
    trusted(ca_certificate)
    return Path(ca_certificate).read_bytes()
