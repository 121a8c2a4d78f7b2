"""One file per wire protocol, each an adapter that gives an `Endpoint` (base.py): connect, preflight, requests."""
