"""The daemon's process: builds everything from the configuration, serves until it is told to stop, lets go in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import structlog
import uvloop

from migrated.base.tasks import TaskSet
from migrated.control.access import Access, AccessError
from migrated.control.server import ControlServer, ControlSocketError
from migrated.environment import DaemonRole
from migrated.host.migration_host import MigrationHost
from migrated.kernel.memory import bound_heap, give_back_heap
from migrated.link.listener import Listener, bind
from migrated.link.security import PlainRefusedError
from migrated.link.tls import CredentialsError
from migrated.observe.logs import LogCollector, configure, set_level
from migrated.record.terms import FINISHED
from migrated.service.activation import ActivationError, inherited_socket
from migrated.service.notify import Notifier
from migrated.service.user import UserError, give_up_privileges
from migrated.settings.config import Address, Config, ConfigError
from migrated.state.history import HistoryError
from migrated.state.journal import JournalError
from migrated.state.run_marks import RunMarkError

log = structlog.get_logger()

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
_SWITCH_INTERVAL_S: Final = 0.0005
"""How long a thread may keep the interpreter from another: data threads and the event loop share it."""
_TRACK_S: Final = 1.0
_CERTIFICATE_CHECK_S: Final = 3600.0
_RELOADED: Final = frozenset({"migration", "log", "tls", "authorisation"})
"""Sections that a reload takes over (of [log] the level); a change of any other needs a restart."""


class StartError(Exception):
    """The daemon cannot start; the sentence says why and what to do."""


def run_daemon(config: Config, role: DaemonRole, read_again: Callable[[], Config]) -> int:
    """Run a daemon until it is told to stop.

    Args:
        read_again: reads the configuration anew, for a reload (SIGHUP).

    Returns:
        The exit status.
    """
    try:
        collector = configure(config.log.level, config.log.format, file=config.log.file)
    except OSError as error:
        sys.stderr.write(f"the log file {config.log.file} cannot be opened: {error.strerror}\n")
        return EXIT_FAILED
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    bound_heap()
    try:
        bound = _bind(config, role)
        give_up_privileges(config)
        uvloop.run(_serve(config, role, collector, read_again, bound))
    except (
        StartError,
        UserError,
        ConfigError,
        ActivationError,
        CredentialsError,
        ControlSocketError,
        JournalError,
        HistoryError,
        RunMarkError,
    ) as error:
        log.error("the daemon cannot start", reason=str(error))
        return EXIT_FAILED
    return EXIT_OK


async def _serve(
    config: Config,
    role: DaemonRole,
    collector: LogCollector,
    read_again: Callable[[], Config],
    bound: socket.socket | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop)
    notifier = Notifier.from_environment()
    tasks = TaskSet()
    # The control socket comes first: its lock keeps a second daemon away from the same journal and guests.
    host = MigrationHost(config, role, collector)
    control = ControlServer(host, config.control.socket, _access(config))
    async with contextlib.AsyncExitStack() as stack:
        undo = stack.push_async_callback
        undo(host.stop)
        await control.start()
        undo(control.close)
        await _start(host)
        listener = Listener(host.connected, config.limits, host.security, host.metrics.connection_refused)
        if bound is not None:
            _listen(listener, config, bound)
            undo(listener.stop)
            _check_told(config, listener.address)
            host.listening(listener.address)
        stop_metrics = _serve_metrics(host, config)
        if stop_metrics is not None:
            undo(asyncio.to_thread, stop_metrics)
        undo(tasks.stop)
        tasks.start(notifier.feed_watchdog())
        tasks.start(_track(host, listener))
        tasks.start(_watch_certificate(host))
        gc.collect()
        gc.freeze()  # objects made so far stay: the collector need not look at them again
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.start(_reload(host, config, read_again, notifier)))
        where = f", listening on {listener.address}" if listener.address is not None else ""
        log.info("ready", role=role, control=str(config.control.socket), listen=str(listener.address or "-"))
        notifier.ready(f"serving {config.control.socket}{where}")
        waiting = [asyncio.create_task(event.wait()) for event in (stop, host.stopping)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        log.info("stopping")
        notifier.stopping("finishing what is under way")


async def _start(host: MigrationHost) -> None:
    try:
        await host.start()
    except OSError as error:
        where = error.filename or "a file or directory of the configuration"
        raise StartError(
            f"{where} cannot be used: {error.strerror or error}; check its permissions, or configure another"
        ) from error


async def _reload(host: MigrationHost, begun: Config, read_again: Callable[[], Config], notifier: Notifier) -> None:
    """Take over the settings that may change while the daemon runs; running migrations keep those they began with."""
    notifier.reloading()
    try:
        config = await asyncio.to_thread(read_again)
    except ConfigError as error:
        log.error("the configuration was not reloaded: it has problems", problems=str(error).splitlines())
    else:
        host.set_defaults(config.migration)
        set_level(config.log.level)
        try:
            # Reading certificates takes a millisecond, and the new ones count from the next handshake on.
            host.security.reload(config.tls, config.authorisation)
        except CredentialsError as error:
            log.error("the certificates were not reloaded: the old ones stay in use", reason=str(error))
        _look_at_certificate(host)
        ignored = [
            name
            for name in Config.model_fields
            if name not in _RELOADED and getattr(config, name) != getattr(begun, name)
        ]
        log.info("the configuration was reloaded", taken=sorted(_RELOADED), needs_restart=ignored)
    notifier.ready("serving")


def _access(config: Config) -> Access:
    try:
        return Access(config.control.operators, config.control.readers)
    except AccessError as error:
        raise StartError(str(error)) from error


def _on_signal(stop: asyncio.Event) -> None:
    """Stop in order; a second signal does not wait."""
    if stop.is_set():
        os._exit(130)
    stop.set()


def _bind(config: Config, role: DaemonRole) -> socket.socket | None:
    """The socket that sources will connect to, from the service manager or bound here; None for a source."""
    inherited = inherited_socket()
    if role != "source":
        with _told_as("address", config.listen.address):
            return inherited or bind(config.listen.address)
    if inherited is not None:
        log.warning("the socket from the service manager is not used: a source takes no guests in")
        inherited.close()
    return None


def _listen(listener: Listener, config: Config, bound: socket.socket) -> None:
    with _told_as("address", config.listen.address):
        listener.start(bound)
    if config.listen.unix is not None:
        with _told_as("unix", config.listen.unix):
            listener.start_unix(config.listen.unix)


@contextlib.contextmanager
def _told_as(key: str, where: Address | Path) -> Iterator[None]:
    """Tell an operator why it cannot be listened at a place that a key of ``[listen]`` names."""
    try:
        yield
    except PlainRefusedError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(
            f"cannot listen on {where}: {error.strerror or error}; is another daemon running there? "
            f"Set [listen] {key} to a free one"
        ) from error


def _check_told(config: Config, address: Address | None) -> None:
    """Make sure that the other hosts of the fleet can be told where this one listens. Of the configured address that
    was known before; a service manager may have passed a socket with another one."""
    if config.fleet.endpoints and config.fleet.address is None and address is not None and address.is_wildcard:
        raise StartError(
            f"[fleet] address must say where other hosts reach this one: the socket from the service manager listens "
            f"at {address}, which stands for all of its addresses"
        )


def _serve_metrics(host: MigrationHost, config: Config) -> Callable[[], None] | None:
    if config.metrics.address is None:
        return None
    try:
        return host.metrics.serve(config.metrics.address)
    except OSError as error:
        raise StartError(
            f"cannot serve metrics on {config.metrics.address}: {error.strerror or error}; set [metrics] address to a "
            "free one"
        ) from error


async def _watch_certificate(host: MigrationHost) -> None:
    """Warn of a certificate that ends, again and again."""
    while True:
        _look_at_certificate(host)
        await asyncio.sleep(_CERTIFICATE_CHECK_S)


def _look_at_certificate(host: MigrationHost) -> None:
    credentials = host.security.credentials
    host.metrics.certificate(credentials.expires_at_s if credentials is not None else None)
    if credentials is not None and (warning := credentials.expiry_warning()) is not None:
        log.warning("the certificate ends", reason=warning)


async def _track(host: MigrationHost, listener: Listener) -> None:
    """Keep the gauges of running migrations up to date, and after migrations let go of what they left behind."""
    tidied: set[str] = set()
    while True:
        progress = host.progress(None)
        host.metrics.track(progress)
        host.metrics.connections(listener.connections)
        ended = {one.migration_id for one in progress if one.status in FINISHED}
        if len(ended) == len(progress) and ended != tidied:
            tidied = ended
            host.tidy()
            gc.collect()  # no guest waits for anything now
            await asyncio.to_thread(give_back_heap)
        await asyncio.sleep(_TRACK_S)
