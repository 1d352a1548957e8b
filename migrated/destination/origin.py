"""Which host an attempt comes from: what another one offers of the same guest must not touch it."""

from __future__ import annotations

from dataclasses import dataclass

from migrated.link.security import Names


@dataclass(frozen=True, slots=True)
class Origin:
    """The other end of a control channel.

    Attributes:
        peer: its address and port.
        names: what its certificate calls it, empty without TLS.
    """

    peer: str
    names: Names

    def same_host(self, other: Origin) -> bool:
        """Whether both are one host: by their certificates, or by their addresses where there are none."""
        if self.names or other.names:
            return self.names == other.names
        return self.peer.rpartition(":")[0] == other.peer.rpartition(":")[0]
