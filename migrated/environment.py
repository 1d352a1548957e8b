"""The parts of a daemon that every attempt needs, passed in once: configuration, clocks, journal, guests, and the
functions that take finished records and events."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from migrated.base.clock import HostClock
from migrated.fleet.ownership import Keeper
from migrated.guests.registry import GuestRegistry
from migrated.link.security import LinkSecurity
from migrated.prediction.knowledge import Knowledge
from migrated.record.model import Record
from migrated.record.terms import Role
from migrated.settings.config import Config
from migrated.state.journal import Journal
from migrated.state.run_marks import RunMarks
from migrated.vmm.resume_costs import ResumeCosts
from migrated.vmm.seam import Replacement

DaemonRole = Literal["source", "destination", "host"]
"""The directions of migration that a daemon serves; a host serves both."""


@dataclass(slots=True)
class Environment:
    """One daemon, as the attempts see it.

    Attributes:
        security: TLS, and the rules on which peers this host talks to.
        knowledge: corrections and bounds learned from past records.
        run_marks: the daemon's own marks of the guests that ran here.
        resume_costs: measured durations of resumes on this host.
        finish: takes each finished record, with this host's part in it.
        publish: sends a QMP event: name and data.
        hold_events: the guest of a migration is about to be stopped: nobody is woken for events until it runs again.
        take_log: the log lines collected for this host's part in a migration.
        open_own: connects to this daemon itself, with what an operator wants of the VMM that a guest gets by that.
        keeper: knows who owns a guest in the fleet; None for a host that belongs to none.
    """

    config: Config
    clock: HostClock
    security: LinkSecurity
    journal: Journal
    run_marks: RunMarks
    guests: GuestRegistry
    knowledge: Knowledge
    resume_costs: ResumeCosts
    host: str
    finish: Callable[[Record, Role], None]
    publish: Callable[[str, dict[str, Any]], None]
    hold_events: Callable[[str], None]
    take_log: Callable[[str, Role], list[dict[str, str]]]
    open_own: Callable[[Replacement], socket.socket]
    keeper: Keeper | None = None


def host_name(config: Config) -> str:
    """Name of this daemon for its peer and in records."""
    return f"{socket.gethostname()} ({config.control.socket})"


def fleet_name(config: Config) -> str:
    """Name of this host in its fleet."""
    return config.fleet.name or socket.gethostname()
