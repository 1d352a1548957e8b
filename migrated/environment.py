"""What every attempt needs of its daemon, handed in once: configuration, clocks, journal, guests, and where finished
records and events go."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from migrated.base.clock import HostClock
from migrated.guests.registry import GuestRegistry
from migrated.link.security import LinkSecurity
from migrated.prediction.knowledge import Knowledge
from migrated.record.model import Record
from migrated.record.terms import Role
from migrated.settings.config import Config
from migrated.state.journal import Journal
from migrated.state.run_marks import RunMarks
from migrated.vmm.resume_costs import ResumeCosts

DaemonRole = Literal["source", "destination", "host"]
"""Which directions a daemon takes part in; a host takes part in both."""


@dataclass(slots=True)
class Environment:
    """One daemon, as the attempts see it.

    Attributes:
        security: whom this host talks to, and how.
        knowledge: what past records taught about switchovers.
        run_marks: the daemon's own word on which guests ran here.
        resume_costs: what resuming guests took on this host.
        finish: takes each finished record, with this host's part in it.
        publish: sends a QMP event: name and data.
        hold_events: the guest of a migration is about to be stopped: nobody is woken for events until it runs again.
        take_log: the log lines collected for a migration.
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
    take_log: Callable[[str], list[dict[str, str]]]


def host_name(config: Config) -> str:
    """How this daemon names itself to its peer and in records."""
    return f"{socket.gethostname()} ({config.control.socket})"
