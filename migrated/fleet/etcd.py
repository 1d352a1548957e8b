"""The store of a fleet in etcd 3.4 or newer, through its JSON gateway.

    call -> the endpoint that answered last -> the next one, if that cannot be reached -> ... until the deadline

A read goes on at the next endpoint whatever became of it at the last one. A transaction that has left this host is not
sent again: an endpoint that does not answer may have carried it out. It ends with NoAnswerError, and whoever sent it
looks at the keys.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import aiohttp

from migrated.fleet.gateway import (
    change_in,
    coded,
    coded_end,
    compare_document,
    document_of,
    entries_in,
    operation_document,
    revision_in,
    understood,
)
from migrated.fleet.store import (
    PAGE_ENTRIES,
    Answer,
    Change,
    CompactedError,
    Entry,
    LeaseEndedError,
    NoAnswerError,
    Page,
    StoreError,
    Transaction,
)

_NOT_FOUND: Final = 5
_OUT_OF_RANGE: Final = 11
_UNAVAILABLE: Final = frozenset({1, 2, 4, 14})
"""gRPC's numbers of what says nothing about whether the call was carried out: cancelled, unknown, late, unavailable."""
_UNAUTHENTICATED: Final = 16
_CONNECT_SHARE: Final = 3
"""Connecting to one endpoint may take this part of a call's time, so that others remain to be tried."""
_QUIET_S: Final = 20.0
"""A watch that has told nothing for this long is begun anew, perhaps elsewhere: its endpoint may be cut off."""
_MAX_ANSWER_BYTES: Final = 64 << 20
_MAX_LINE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Login:
    """User and password, where etcd asks for them."""

    user: str
    password: str


class _RefusedError(Exception):
    """An endpoint answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _UnreachableError(Exception):
    """An endpoint could not be connected to: it has not seen the call."""


class EtcdStore:
    """A client of one etcd cluster (``migrated.fleet.store.Store``). Make it inside the event loop; close it.

    Args:
        endpoints: URLs of the members, ``http://HOST:PORT`` or ``https://HOST:PORT``.
        timeout_s: how long a call may take, all endpoints together.
        tls: authority and certificate for https; None for http.
        login: None where etcd asks for none.

    Attributes:
        clock_offset_ns: how far this host's wall clock is ahead of etcd's, to a second, as the last answer had it; None
            before the first one.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        timeout_s: float,
        *,
        tls: ssl.SSLContext | None = None,
        login: Login | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.clock_offset_ns: int | None = None
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._timeout_s = timeout_s
        self._login = login
        self._wall_ns = wall_ns
        self._token = ""
        self._first = 0
        """Index of the endpoint that is asked first."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls if tls is not None else True, limit=16),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout_s / _CONNECT_SHARE),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    # Section: the calls of a store

    async def get(self, key: str) -> Entry | None:
        """As ``Store.get``."""
        found = await self._call("/v3/kv/range", {"key": coded(key)}, again=True)
        with understood():
            revision_in(found)  # only etcd may say that there is no such key
            entries = entries_in(found)
        return entries[0] if entries else None

    async def range(self, prefix: str, *, after: str = "", revision: int = 0) -> Page:
        """As ``Store.range``."""
        wanted = {
            "key": coded(f"{after}\0" if after else prefix),
            "range_end": coded_end(prefix),
            "limit": str(PAGE_ENTRIES),
            "revision": str(revision),
        }
        found = await self._call("/v3/kv/range", wanted, again=True)
        with understood():
            return Page(tuple(entries_in(found)), revision or revision_in(found), bool(found.get("more")))

    async def transact(self, transaction: Transaction) -> Answer:
        """As ``Store.transact``."""
        wanted = {
            "compare": [compare_document(one) for one in transaction.compares],
            "success": [operation_document(one) for one in transaction.then],
            "failure": [operation_document(one) for one in transaction.otherwise],
        }
        found = await self._call("/v3/kv/txn", wanted, again=False)
        with understood():
            reads = [one["response_range"] for one in found.get("responses", ()) if "response_range" in one]
            entries = tuple(one[0] if one else None for one in map(entries_in, reads))
            return Answer(bool(found.get("succeeded")), revision_in(found), entries)

    async def grant(self, ttl_s: int) -> int:
        """As ``Store.grant``."""
        found = await self._call("/v3/lease/grant", {"TTL": str(ttl_s)}, again=True)
        with understood():
            return int(found["ID"])

    async def keep_alive(self, lease: int) -> None:
        """As ``Store.keep_alive``."""
        found = await self._call("/v3/lease/keepalive", {"ID": str(lease)}, again=True)
        with understood():
            left_s = int(found["result"].get("TTL", 0))
        if left_s <= 0:
            raise LeaseEndedError(f"The lease {lease:x} has ended: etcd did not hear of this host in time.")

    async def revoke(self, lease: int) -> None:
        """As ``Store.revoke``."""
        try:
            await self._call("/v3/lease/revoke", {"ID": str(lease)}, again=True)
        except LeaseEndedError:
            return

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[tuple[Change, ...], None]:
        """As ``Store.watch``."""
        wanted = {
            "create_request": {
                "key": coded(prefix),
                "range_end": coded_end(prefix),
                "start_revision": str(revision),
            }
        }
        response = await self._open("/v3/watch", wanted)
        try:
            async for line in _lines(response):
                with understood():
                    result = document_of(line).get("result", {})
                    if "compact_revision" in result:
                        raise CompactedError(f"etcd no longer keeps the revision {revision}.")
                    if result.get("canceled"):
                        why = result.get("cancel_reason") or "it gave no reason"
                        raise NoAnswerError(f"etcd ended the watch: {why}.")
                    changes = [change_in(event) for event in result.get("events", ())]
                for _, same in groupby(changes, key=lambda change: change.revision):
                    yield tuple(same)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise NoAnswerError(f"The watch at {response.url.host} has ended: {error or 'nothing came'}.") from error
        finally:
            response.close()
        raise NoAnswerError(f"The watch at {response.url.host} has ended.")

    # Section: one call

    async def _call(self, path: str, wanted: Mapping[str, Any], *, again: bool) -> dict[str, Any]:
        """Make a call and return its answer.

        Args:
            again: it may be made twice without harm.

        Raises:
            NoAnswerError: none came in time.
            StoreError: etcd refused it.
        """
        why = "nothing answers"
        share_s = self._timeout_s / len(self._endpoints) if again else None
        endpoint = self._endpoints[self._first]
        try:
            async with asyncio.timeout(self._timeout_s):
                for endpoint in self._in_turn():
                    try:
                        async with asyncio.timeout(share_s):
                            return await self._ask(endpoint, path, wanted)
                    except _UnreachableError as error:
                        why = str(error)
                    except _RefusedError as error:
                        if error.code not in _UNAVAILABLE:
                            raise _refusal(error) from error
                        why = f"{endpoint}: {error}"
                        if not again:
                            break
                    except (aiohttp.ClientError, TimeoutError, NoAnswerError) as error:
                        why = f"{endpoint}: {_told(error, endpoint)}"
                        if not again:
                            break
                    self._pass_over(endpoint)
        except TimeoutError:
            self._pass_over(endpoint)
            why = f"no answer within {self._timeout_s:g} s"
        except asyncio.CancelledError:
            self._pass_over(endpoint)  # whoever asked could not wait longer
            raise
        raise NoAnswerError(f"etcd does not answer ({', '.join(self._endpoints)}): {why}.")

    def _in_turn(self) -> list[str]:
        """The endpoints, the one that answered last first."""
        return self._endpoints[self._first :] + self._endpoints[: self._first]

    def _pass_over(self, endpoint: str) -> None:
        """Ask the next endpoint first from now on; calls that failed at the same time move on by one together."""
        if self._endpoints[self._first] == endpoint:
            self._first = (self._first + 1) % len(self._endpoints)

    async def _ask(self, endpoint: str, path: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Make a call at one endpoint, after logging in if need be."""
        for renew in (False, True):
            try:
                with understood():
                    token = await self._log_in(endpoint, renew=renew)
                    return await self._post(endpoint, path, wanted, token)
            except _RefusedError as error:
                if error.code != _UNAUTHENTICATED or self._login is None or renew:
                    raise
        raise _RefusedError(_UNAUTHENTICATED, "the login is not accepted")

    async def _log_in(self, endpoint: str, *, renew: bool) -> str:
        if self._login is not None and (renew or not self._token):
            given = {"name": self._login.user, "password": self._login.password}
            self._token = str((await self._post(endpoint, "/v3/auth/authenticate", given, ""))["token"])
        return self._token

    async def _post(self, endpoint: str, path: str, wanted: Mapping[str, Any], token: str) -> dict[str, Any]:
        response = await self._request(endpoint, path, wanted, token, quiet_s=None)
        try:
            body = await _body(response)
        finally:
            response.release()
        answer = document_of(body)
        if response.status != 200 or "error" in answer:
            raise _as_refusal(response.status, answer)
        return answer

    async def _request(
        self, endpoint: str, path: str, wanted: Mapping[str, Any], token: str, *, quiet_s: float | None
    ) -> aiohttp.ClientResponse:
        # hasleader: a member that is cut off from the others refuses, instead of serving what it last knew.
        headers = {"Grpc-Metadata-hasleader": "true", **({"Authorization": token} if token else {})}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s / _CONNECT_SHARE, sock_read=quiet_s)
        try:
            response = await self._session.post(endpoint + path, json=wanted, headers=headers, timeout=timeout)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _UnreachableError(f"{endpoint}: {error}") from error
        if (date := response.headers.get("Date")) is not None:
            self._note_clock(date)
        return response

    def _note_clock(self, date: str) -> None:
        try:
            theirs = email.utils.parsedate_to_datetime(date).timestamp()
        except ValueError:
            return
        self.clock_offset_ns = (self._wall_ns() // 1_000_000_000 - int(theirs)) * 1_000_000_000

    async def _open(self, path: str, wanted: Mapping[str, Any]) -> aiohttp.ClientResponse:
        """Begin a call that answers line by line.

        Raises:
            NoAnswerError: no endpoint began to answer in time.
        """
        why = "nothing answers"
        endpoint = self._endpoints[self._first]
        try:
            async with asyncio.timeout(self._timeout_s):
                for endpoint in self._in_turn():
                    try:
                        with understood():
                            token = await self._log_in(endpoint, renew=False)
                        response = await self._request(endpoint, path, wanted, token, quiet_s=_QUIET_S)
                    except _UnreachableError as error:
                        why = str(error)
                        self._pass_over(endpoint)
                        continue
                    except (_RefusedError, aiohttp.ClientError, TimeoutError, NoAnswerError) as error:
                        why = f"{endpoint}: {_told(error, endpoint)}"
                        self._pass_over(endpoint)
                        continue
                    if response.status == 200:
                        return response
                    response.close()
                    why = f"{endpoint}: status {response.status}"
                    self._token = ""
                    self._pass_over(endpoint)
        except TimeoutError:
            self._pass_over(endpoint)
            why = f"no answer within {self._timeout_s:g} s"
        raise NoAnswerError(f"etcd does not answer ({', '.join(self._endpoints)}): {why}.")


def _told(error: Exception, endpoint: str) -> str:
    """The words for a call that failed.

    In TLS 1.3 an endpoint turns away whom it does not accept only after the handshake: who writes at that moment sees
    a connection that was closed, and may never read the alert that says why.
    """
    if isinstance(error, aiohttp.ClientOSError) and not error.errno and endpoint.startswith("https:"):
        return "it closed the connection while the call was sent: see whether it accepts this host's certificate"
    return str(error) or "no answer"


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """A whole answer."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
    return bytes(body)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of an answer; one may hold all that was written at once."""
    rest = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line
        if len(rest) > _MAX_LINE_BYTES:
            raise aiohttp.ClientPayloadError(f"a line is longer than {_MAX_LINE_BYTES} bytes")


def _as_refusal(status: int, answer: Mapping[str, Any]) -> _RefusedError:
    error = answer.get("error")
    if isinstance(error, dict):  # the form of streams
        return _RefusedError(int(error.get("grpc_code", 2)), str(error.get("message", "no reason given")))
    return _RefusedError(int(answer.get("code", 2)), str(error or answer.get("message") or f"status {status}"))


def _refusal(error: _RefusedError) -> StoreError:
    if error.code == _NOT_FOUND and "lease" in str(error):
        return LeaseEndedError("The lease has ended: etcd did not hear of this host in time.")
    if error.code == _OUT_OF_RANGE and "compacted" in str(error):
        return CompactedError("etcd no longer keeps that revision.")
    return StoreError(f"etcd refused: {error}.")
