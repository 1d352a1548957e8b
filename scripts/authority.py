#!/usr/bin/env python3
"""A small certificate authority for tests and first steps: one directory with the authority and a certificate per host.

authority.py DIRECTORY HOST[,ADDRESS...] ...

    authority.py pki a.example,192.0.2.6 b.example,192.0.2.7

makes pki/authority.pem, and for each host NAME.pem and NAME.key; what is there already is kept. Whoever has the
authority's key can make hosts: keep it off them. Keys are readable by their owner alone.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFE: Final = timedelta(days=365)
AUTHORITY_LIFE: Final = timedelta(days=3650)
LIST_LIFE: Final = timedelta(days=30)
CLOCK_SKEW: Final = timedelta(minutes=5)
"""A certificate is valid from a little before now: the hosts' clocks may differ."""


@dataclass(frozen=True, slots=True)
class HostFiles:
    """The files of one host, as ``[tls]`` of its configuration names them."""

    certificate: Path
    key: Path
    authority: Path

    def section(self) -> dict[str, str]:
        """``[tls]`` of the host's configuration."""
        return {"certificate": str(self.certificate), "key": str(self.key), "authority": str(self.authority)}


class Authority:
    """A certificate authority in a directory: read from there, or made there.

    Args:
        directory: where its files and those of the hosts lie.
        name: common name of its certificate.
    """

    def __init__(self, directory: Path, name: str = "migrated authority") -> None:
        self.directory = directory
        self.path = directory / "authority.pem"
        key_path = directory / "authority.key"
        directory.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._certificate = x509.load_pem_x509_certificate(self.path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError(
                    f"{key_path} holds no elliptic-curve key; make the authority anew in an empty directory."
                )
            self._key = key
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject, now = _common_name(name), datetime.now(UTC)
        builder = _begin(subject, subject, self._key.public_key(), now - CLOCK_SKEW, now + AUTHORITY_LIFE)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(certificates=True), critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        _write_key(key_path, self._key)
        _write_certificate(self.path, self._certificate)

    def host(
        self,
        name: str,
        *addresses: str,
        common_name: bool = True,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> HostFiles:
        """Certify a host, in place of what it had.

        Args:
            name: its DNS name, which also names its files.
            addresses: IP addresses at which it is reached.
            common_name: whether the certificate has the name as its subject too, and not only among the alternatives:
                etcd takes no user from a client whose certificate has one.
            not_before, not_after: when the certificate is valid; left out: from now on for a year.
        """
        now = datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [x509.DNSName(name)]
        alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        builder = _begin(
            _common_name(name) if common_name else x509.Name([]),
            self._certificate.subject,
            key.public_key(),
            not_before or now - CLOCK_SKEW,
            not_after or now + LIFE,
        )
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(certificates=False), critical=True)
        builder = builder.add_extension(own, critical=False)
        builder = builder.add_extension(uses, critical=False)  # a host is client and server
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=not common_name)
        files = self.files(name)
        _write_key(files.key, key)
        _write_certificate(files.certificate, builder.sign(self._key, hashes.SHA256()))
        return files

    def revoke(self, *names: str, next_update: datetime | None = None) -> Path:
        """Make the list of revoked certificates: those that hosts have now, in place of what was on it.

        Args:
            names: of the hosts.
            next_update: when the list runs out; left out: in 30 days.

        Returns:
            The file, as ``[tls] revoked`` names it.
        """
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._certificate.subject)
        builder = builder.last_update(min(now, next_update or now) - CLOCK_SKEW)
        builder = builder.next_update(next_update or now + LIST_LIFE)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(own, critical=False)
        builder = builder.add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        for name in names:
            certificate = x509.load_pem_x509_certificate(self.files(name).certificate.read_bytes())
            entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        path = self.directory / "revoked.pem"
        signed = builder.sign(self._key, hashes.SHA256())
        _write(path, signed.public_bytes(serialization.Encoding.PEM), 0o644)
        return path

    def files(self, name: str) -> HostFiles:
        """Where the files of a host are."""
        return HostFiles(self.directory / f"{name}.pem", self.directory / f"{name}.key", self.path)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    """Return a builder with the fields that every certificate has."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(path, pem, 0o600)


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    _write(path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Replace a file at once, so that a daemon never reads half of it."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    fresh.replace(path)


def main() -> None:
    """Make what the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where authority and certificates lie, or shall lie")
    parser.add_argument(
        "hosts", nargs="+", metavar="HOST[,ADDRESS...]", help="a host and the addresses it is reached at"
    )
    arguments = parser.parse_args()
    authority = Authority(arguments.directory)
    for host in arguments.hosts:
        name, *addresses = host.split(",")
        files = authority.files(name)
        kept = files.certificate.exists()
        if not kept:
            authority.host(name, *addresses)
        print(f"{files.certificate}{' (kept)' if kept else ''}")


if __name__ == "__main__":
    main()
