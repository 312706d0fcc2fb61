"""TLS from files of PEM, checked when the configuration is read."""

from __future__ import annotations

import ssl
from pathlib import Path


def server(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """What shows clients who the server is. Raises `ValueError`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    show(context, cert_file, key_file)
    return context


def client(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """What checks a server, and shows it who the client is if it wants to know. Raises `ValueError`."""
    if (cert_file is None) != (key_file is None):
        raise ValueError("cert_file and key_file go together")
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ValueError(f"ca_file {ca_file}: {_reason(error)}") from error
    if cert_file is not None and key_file is not None:
        show(context, cert_file, key_file)
    return context


def show(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    """Have the context show this certificate. Raises `ValueError`."""
    for path in (cert_file, key_file):
        if not path.is_file():
            raise ValueError(f"no such file: {path}")
    try:
        context.load_cert_chain(cert_file, key_file, password=lambda: " ")  # never ask the terminal for one
    except OSError as error:
        raise ValueError(f"{cert_file} and {key_file}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    words = {
        "KEY_VALUES_MISMATCH": "the key is not the certificate's",
        "NO_CERTIFICATE_OR_CRL_FOUND": "holds no certificate in PEM form",
    }
    if isinstance(error, ssl.SSLError):
        return words.get(error.reason or "", "are not a certificate and its key in PEM form, without a password")
    return str(error.strerror)
