"""Whom a TLS client trusts."""

import ssl

from evaluator.errors import NotFoundError, OptionsError


def trusted(ca_certificate: str | None) -> ssl.SSLContext:
    """The authorities of a PEM file, or the system's.

    Raises:
        NotFoundError, OptionsError: the file of --ca-certificate is missing, or holds no certificates.
    """
    try:
        return ssl.create_default_context(cafile=ca_certificate)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"--ca-certificate: expected a PEM file of certificates, found nothing at {ca_certificate}"
        ) from error
    except (OSError, ssl.SSLError) as error:
        raise OptionsError(
            f"--ca-certificate: expected a PEM file of certificates, cannot read {ca_certificate} as one "
            f"({error.strerror or error})"
        ) from error
