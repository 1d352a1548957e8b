"""Mutual TLS 1.3 between two daemons, apart from any socket: bytes from the wire in, bytes for the wire out.

    socket --received--> TlsSession --plain--> frames        frames --plain--> TlsSession --encrypted--> socket

So the control channel on the event loop and the data channels in their threads use the same few lines, and a
connection can begin on the one and go on in the other. Both sides show a certificate of the same authority, always;
there is no resumption, so every connection proves anew who its ends are.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, cast

from migrated.base.errors import LinkLostError
from migrated.settings.config import TlsConfig
from protocol.versions import PREFACE_MAGIC

READ_BYTES: Final = 128 << 10
EXPIRY_WARNING_S: Final = 14 * 86400
"""How long before its end a certificate is warned of."""

_PEER_CERTIFICATE: Final = {
    2: "its certificate is not of our [tls] authority",
    3: "[tls] revoked has no list of its authority: put one there and reload (SIGHUP)",
    9: "its certificate is not valid yet: compare the clocks of both hosts",
    10: "its certificate, or its authority's, has expired: renew it there and let its daemon reload (SIGHUP)",
    11: "the list of its authority in [tls] revoked is not valid yet: compare the clocks of both hosts",
    12: "the list of its authority in [tls] revoked has run out: put a new one there and reload (SIGHUP)",
    18: "its certificate is self-signed and not of our [tls] authority",
    19: "its certificate is of another authority than our [tls] authority",
    20: "its certificate is of another authority than our [tls] authority",
    21: "its certificate is of another authority than our [tls] authority",
    23: "its certificate has been revoked",
    26: "its certificate is not meant for this use: it needs both serverAuth and clientAuth",
}
"""Sentences for faults of the peer's certificate, by OpenSSL's X509_V_ERR number."""
_HOST_MISMATCH: Final = frozenset({62, 64})

_PEER_SAYS: Final = {
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of our certificate: both hosts need one [tls] authority",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of ours: set [tls] certificate, key and authority",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it says that our certificate has expired: renew it and reload (SIGHUP)",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it says that our certificate is revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take our certificate, perhaps for the address it was reached at",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not take our certificate; its log says why",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it says that our certificate is not meant for this use",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "NO_PROTOCOLS_AVAILABLE": "it does not speak TLS 1.3",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate: set [tls] certificate, key and authority there",
}
"""Sentences for a handshake that the peer ended, by OpenSSL's reason."""


class TlsError(LinkLostError):
    """A connection cannot be secured, or what came over it cannot be decrypted; the sentence says why."""


class CredentialsError(Exception):
    """The files of ``[tls]`` cannot be used; the sentence says which and what to do."""


class Credentials:
    """This host's certificate, key and authority, as two contexts; files are read once, when it is made.

    Args:
        certificate, key, authority: PEM files, as ``[tls]`` names them.
        revoked: a PEM file with the authority's list of revoked certificates; None where there is none.

    Raises:
        CredentialsError: a file is missing or is not what it should be.
    """

    def __init__(self, certificate: Path, key: Path, authority: Path, revoked: Path | None = None) -> None:
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, authority, revoked)
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, authority, revoked)
        try:
            self.expires_at_s = _expires_at_s(certificate)
        except (ValueError, IndexError) as error:
            raise CredentialsError(
                f"[tls] certificate {certificate} has no date of its end that can be read"
            ) from error
        """When the certificate ends (seconds since 1970)."""
        self._certificate = certificate

    @classmethod
    def of(cls, config: TlsConfig) -> Credentials | None:
        """Load the files that the configuration names; None without TLS."""
        if config.certificate is None or config.key is None or config.authority is None:
            return None
        return cls(config.certificate, config.key, config.authority, config.revoked)

    def expiry_warning(self) -> str | None:
        """A sentence when the certificate ends soon or has ended."""
        left_s = self.expires_at_s - time.time()
        if left_s > EXPIRY_WARNING_S:
            return None
        end = datetime.fromtimestamp(self.expires_at_s, UTC).isoformat(timespec="minutes")
        what = f"expires at {end}, in {left_s / 86400:.1f} days" if left_s > 0 else f"has expired at {end}"
        return f"the certificate {self._certificate} {what}: replace the file and reload (SIGHUP)"


class TlsSession:
    """TLS of one connection, either end. Not for two threads at once.

    Args:
        context: of ``Credentials``.
        peer: the other end's address, for sentences.
        expected_host: client only: the host name or address that the server's certificate must carry.
    """

    def __init__(self, context: ssl.SSLContext, peer: str, expected_host: str | None = None) -> None:
        self._peer = peer
        self._expected_host = expected_host
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=expected_host is None, server_hostname=expected_host
        )
        self._opening = b""

    def handshake(self, received: bytes) -> bool:
        """Take what was received, go on with the handshake, and say whether it is done. Whatever it says, and also
        when it raises, what ``to_send`` gives is for the peer.

        Raises:
            TlsError: it failed; the sentence says why.
        """
        self._opening = (self._opening + received)[: len(PREFACE_MAGIC)]
        self._incoming.write(received)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise self._failed(error) from error
        return True

    @property
    def plain_peer(self) -> bool:
        """Whether the peer opened with our protocol and without TLS."""
        return self._opening == PREFACE_MAGIC

    def peer_names(self) -> tuple[str, ...]:
        """The DNS names and IP addresses in the peer's certificate, sorted; there after the handshake. What calls
        itself a DNS name and has a colon is none: it could pass for ``link.security.THIS_HOST``."""
        alternatives = cast("tuple[tuple[str, str], ...]", (self._tls.getpeercert() or {}).get("subjectAltName", ()))
        names = (name for kind, name in alternatives if kind == "IP Address" or (kind == "DNS" and ":" not in name))
        return tuple(sorted(name.lower() for name in names))

    def to_send(self) -> bytes:
        """Return the bytes that are to be sent to the peer now."""
        return self._outgoing.read()

    def encrypt(self, *plain: bytes | memoryview) -> bytes:
        """The bytes to send for some plain ones, one after the other."""
        for piece in plain:
            view = memoryview(piece)
            while len(view):
                view = view[self._tls.write(view) :]  # mostly all of it: memory has room for every record
        return self._outgoing.read()

    def receive(self, received: bytes | memoryview) -> None:
        """Take what was received; ``read_into`` gives it out again in plain."""
        self._incoming.write(received)

    def read_into(self, view: memoryview) -> int:
        """Decrypt into a view, as much as is there. Returns how many bytes, 0 when more must be received first.

        Raises:
            TlsError: it cannot be decrypted, or the peer gave up.
        """
        filled = 0
        try:
            while filled < len(view):
                # With a buffer it returns a count, whatever its type says.
                got = cast("int", self._tls.read(len(view) - filled, cast("bytearray", view[filled:])))
                if not got:
                    break
                filled += got
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass  # the end of a connection is no message: what must arrive arrived, or is missed
        except ssl.SSLError as error:
            raise self._failed(error) from error
        return filled

    def decrypt(self, received: bytes) -> bytes:
        """All that can be decrypted once ``received`` was taken.

        Raises:
            TlsError: as ``read_into``.
        """
        self.receive(received)
        parts: list[bytes] = []
        buffer = memoryview(bytearray(READ_BYTES))
        while got := self.read_into(buffer):
            parts.append(bytes(buffer[:got]))
        return b"".join(parts)

    def _failed(self, error: ssl.SSLError) -> TlsError:
        return TlsError(f"no TLS with {self._peer}: {self._why(error)}")

    def _why(self, error: ssl.SSLError) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code in _HOST_MISMATCH:
                return (
                    f"its certificate does not carry {self._expected_host}: migrate to a name or address that it "
                    "carries, or issue it with this one"
                )
            return _PEER_CERTIFICATE.get(error.verify_code, f"its certificate is not valid: {error.verify_message}")
        if self.plain_peer:
            return "it does not use TLS and we do: set [tls] certificate, key and authority there too"
        reason = error.reason or str(error)
        if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"):
            return "what it sent is not TLS: check the address"
        return _PEER_SAYS.get(reason, f"{reason.replace('_', ' ').lower()}")


def opens_with_tls(opening: bytes) -> bool:
    """Whether the first bytes of a connection are those of a TLS handshake."""
    return opening[:2] == b"\x16\x03"


def _context(purpose: int, certificate: Path, key: Path, authority: Path, revoked: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if purpose == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:
        raise CredentialsError(
            f"[tls] certificate {certificate} and key {key} cannot be used: {_reason(error)}; both must be PEM files "
            "that the daemon can read, and belong together"
        ) from error
    try:
        context.load_verify_locations(authority)
    except OSError as error:
        raise CredentialsError(
            f"[tls] authority {authority} cannot be used: {_reason(error)}; it must be a PEM file with certificates"
        ) from error
    if revoked is not None:
        _load_revoked(context, revoked)
    return context


def _load_revoked(context: ssl.SSLContext, revoked: Path) -> None:
    """Have a context refuse certificates that are on the authority's list."""
    reason = "it has no such list"
    try:
        context.load_verify_locations(revoked)
    except OSError as error:
        reason = _reason(error)
    if not context.cert_store_stats()["crl"]:
        raise CredentialsError(
            f"[tls] revoked {revoked} cannot be used: {reason}; it must be a PEM file with the list of revoked "
            "certificates (CRL) of each authority"
        )
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _no_password() -> str:
    raise CredentialsError("[tls] key is encrypted, and a daemon has nobody to ask: store it without a password")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return error.strerror or str(error)


def _expires_at_s(certificate: Path) -> float:
    """The end of the first certificate in a PEM file, from its DER form: the standard library tells it of peers only.

    Certificate, tbsCertificate, [version,] serial, algorithm, issuer, validity: (not before, not after).
    """
    text = certificate.read_text(encoding="ascii", errors="replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first = text[text.index(begin) : text.index(end) + len(end)]
    body = _der_items(_der_items(_der_items(ssl.PEM_cert_to_DER_cert(first))[0][1])[0][1])
    fields = body[1:] if body[0][0] == 0xA0 else body
    tag, stamp = _der_items(fields[3][1])[1]
    digits = stamp.decode("ascii").rstrip("Z")
    if tag == 0x17:  # UTCTime has two digits of the year, GeneralizedTime four
        digits = ("19" if int(digits[:2]) >= 50 else "20") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()


def _der_items(data: bytes) -> Sequence[tuple[int, bytes]]:
    """The items that follow each other in DER, as (tag, content)."""
    items: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            length = int.from_bytes(data[at : at + count], "big")
            at += count
        items.append((tag, data[at : at + length]))
        at += length
    return items
