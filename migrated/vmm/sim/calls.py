"""The connection to one simulated VMM: each call with a bound, its errors as ``VmmError``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from migrated.base.errors import VmmError, VmmGoneError, VmmSilentError
from vmm_sim.client import Reply, VmmClient
from vmm_sim.client import VmmError as ClientError
from vmm_sim.client import VmmGone as ClientGone

QUICK_S: Final = 5.0
PAUSE_S: Final = 30.0
STATE_S: Final = 120.0
VERIFY_S: Final = 600.0


class Calls:
    """Calls to the VMM of one guest. Several may run at once. Build it with ``connect``."""

    def __init__(self, client: VmmClient, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self._client = client

    @classmethod
    async def connect(cls, api_socket: Path, timeout_s: float | None) -> Calls:
        """Connect to a running guest; ``timeout_s`` bounds the wait for its answer.

        Raises:
            VmmGoneError: nobody listens on the socket: the guest's process has ended.
            VmmSilentError: its process is there and does not answer.
            VmmError: it cannot be reached, or its answer is not understood.
        """
        try:
            client = await VmmClient.connect(str(api_socket), timeout=timeout_s)
        except ClientGone as error:
            if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
                raise VmmGoneError(f"no VMM listens on {api_socket}") from error
            if isinstance(error.__cause__, TimeoutError):
                raise VmmSilentError(f"the VMM on {api_socket} takes no connection", 0) from error
            raise VmmError(f"the VMM on {api_socket} cannot be reached: {error}") from error
        pid = client.peer_pid
        try:
            reply = await client.call("status", timeout=timeout_s)
            return cls(client, reply.meta["name"], reply.meta["pid"])
        except BaseException as error:
            await client.close()
            if isinstance(error, TimeoutError):
                raise VmmSilentError(f"the VMM on {api_socket} (pid {pid}) does not answer", pid) from error
            if isinstance(error, ClientGone):
                raise VmmSilentError(f"the VMM on {api_socket} (pid {pid}) hung up: {error}", pid) from error
            if isinstance(error, ClientError):
                raise VmmError(f"the VMM on {api_socket} (pid {pid}) refused its status: {error}") from error
            if isinstance(error, KeyError):
                raise VmmError(f"the VMM on {api_socket} (pid {pid}) gives a status without {error}") from error
            raise

    async def call(self, op: str, timeout_s: float = QUICK_S, payload: Any = b"", **arguments: Any) -> Reply:
        """Make one call.

        Raises:
            VmmGoneError, VmmSilentError, VmmError: there is no answer, none in time, or a refusal.
        """
        try:
            return await self._client.call(op, payload=payload, timeout=timeout_s, **arguments)
        except ClientGone as error:
            raise VmmGoneError(f"the VMM of guest {self.name} (pid {self.pid}) is gone: {error}") from error
        except ClientError as error:
            raise VmmError(f"the VMM of guest {self.name} refused {op}: {error}") from error
        except TimeoutError as error:
            raise VmmSilentError(
                f"the VMM of guest {self.name} (pid {self.pid}) did not answer {op} within {timeout_s:g} s", self.pid
            ) from error

    async def close(self) -> None:
        """End the connection; the guest does not notice."""
        await self._client.close()
