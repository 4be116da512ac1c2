"""A private certificate authority, the server's certificate, one key a device.

DIR/ca.key                                 stays where it was made
DIR/server/{ca.crt, server.pem, server.key, nodes/device-00.pub ..}      for the server
DIR/device-00/{ca.crt, device.key}         for one device, and for no other machine
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .. import files
from ..messages import device_name

YEARS = 5
# the server's own processes speak to it over loopback
ALWAYS = ("localhost", "127.0.0.1")


def make_keys(folder: Path, hosts: Sequence[str], num_devices: int) -> list[Path]:
    """Make what is missing; return the new files. Existing keys stay, the server's names do not.

    hosts: every name or address under which devices reach the server.
    """
    made: list[Path] = []
    authority_key, authority = _authority(folder, made)
    server = folder / "server"
    certificate = authority.public_bytes(Encoding.PEM)
    _server(server, hosts, authority_key, authority, made)
    _public(server / "ca.crt", certificate)
    for index in range(num_devices):
        home = folder / device_name(index)
        _public(home / "ca.crt", certificate)
        public = server / "nodes" / f"{device_name(index)}.pub"
        if (home / "device.key").exists():
            continue
        key = ec.generate_private_key(ec.SECP384R1())
        # Flower reads a node's key in the format of OpenSSH
        _secret(home / "device.key", key, PrivateFormat.OpenSSH)
        _public(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        made += [home / "device.key", public]
    return made


def _secret(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(key.private_bytes(Encoding.PEM, form, NoEncryption()))


def _public(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        files.write_bytes(path, content)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # clocks of devices may be behind
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365 * YEARS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority(
    folder: Path, made: list[Path]
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_path, path = folder / "ca.key", folder / "ca.crt"
    if key_path.exists() and path.exists():
        key = load_pem_private_key(key_path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key_path}: must be an elliptic curve key made by `deepfusion keys`")
        return key, x509.load_pem_x509_certificate(path.read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("DeepFusion private CA")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    _secret(key_path, key, PrivateFormat.PKCS8)
    files.write_bytes(path, certificate.public_bytes(Encoding.PEM))
    made += [key_path, path]
    return key, certificate


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _server(
    folder: Path,
    hosts: Sequence[str],
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    made: list[Path],
) -> None:
    """The server's key and a certificate for its names; a new certificate wherever names differ."""
    path = folder / "server.pem"
    names = [_general_name(host) for host in dict.fromkeys((*ALWAYS, *hosts))]
    if path.exists() and (folder / "server.key").exists() and not hosts:
        return
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder(_name("DeepFusion server"), authority.subject, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )
    _secret(folder / "server.key", key, PrivateFormat.PKCS8)
    files.write_bytes(path, certificate.public_bytes(Encoding.PEM))
    made += [folder / "server.key", path]
