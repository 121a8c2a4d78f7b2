"""Certificates of an authority that nobody but the tests trusts."""

import datetime
import ssl
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certificate:
    """PEM files of a certificate and its key."""

    file: Path
    key_file: Path

    @property
    def pair(self) -> tuple[bytes, bytes]:
        """Key and certificate, as gRPC wants them."""
        return self.key_file.read_bytes(), self.file.read_bytes()

    @property
    def context(self) -> ssl.SSLContext:
        """Of a server that shows it."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.file, self.key_file)
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context


class Authority:
    """Issues certificates into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"an authority of {folder.name}")])

    @cached_property
    def file(self) -> str:
        """Its own certificate, to be trusted."""
        path = self._folder / "authority.pem"
        path.write_bytes(
            self._issue(self._name, self._key, [], 1, authority=True).public_bytes(serialization.Encoding.PEM)
        )
        return str(path)

    def certificate(self, *names: str, days: int = 1, by_itself: bool = False) -> Certificate:
        """For these host names and addresses; `days` from now it ends (below zero: it has)."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        issued = self._issue(subject, key, list(names), days, by=(subject, key) if by_itself else None)
        stem = f"{names[0]}{days}".replace(".", "-")
        made = Certificate(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        made.file.write_bytes(issued.public_bytes(serialization.Encoding.PEM))
        made.key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return made

    def _issue(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: list[str],
        days: int,
        by: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None = None,
        authority: bool = False,
    ) -> x509.Certificate:
        issuer, signing = by or (self._name, self._key)
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 9 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if names:
            hosts = [x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        return builder.sign(signing, hashes.SHA256())
