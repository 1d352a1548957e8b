"""Estimate of a migration without migrating: the link is measured with a burst of real pages, the guest by a few
seconds of its dirty log, the destination by its dry run; then the rounds are simulated with these figures.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from migrated.base.errors import MigrationError
from migrated.base.threads import in_thread
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.link.control import ControlChannel
from migrated.prediction.bandwidth import Bandwidth, DirtyCurve
from migrated.prediction.knowledge import class_key
from migrated.prediction.model import Prediction
from migrated.prediction.play import play
from migrated.settings.parameters import MigrationParameters, limit_of
from migrated.source.offer import offer_of
from migrated.source.session import Session, connect, open_session
from migrated.source.target import Target
from protocol import messages
from protocol.guest import PAGE_SIZE
from protocol.pages import Runs, count_pages, indices_of, split_runs

_BURST_PAGES: Final = (64 << 20) // PAGE_SIZE
_SAMPLES_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.0)


async def estimate(env: Environment, guest: Guest, target: Target, parameters: MigrationParameters) -> dict[str, Any]:
    """Predict total time and downtime of a migration, and whether its limit can be kept.

    Raises:
        RefusedError, LinkLostError, MigrationError, VmmError: the destination or the guest cannot be asked.
    """
    description = await guest.vmm.describe()
    offer = await offer_of(guest.vmm, description, parameters)
    connection = await connect(env, target.place)
    try:
        session = await open_session(env, guest.vmm, connection, offer, parameters, secrets.token_hex(16), epoch=1)
        try:
            return await _measured(env, guest.name, session, parameters)
        finally:
            connection.give_up(1, "this was an estimate only")
            await session.close()
    finally:
        await connection.control.close()


async def _measured(env: Environment, guest: str, session: Session, parameters: MigrationParameters) -> dict[str, Any]:
    """Measure over an open session and simulate the rounds; memory that is handed over needs none."""
    control, description = session.connection.control, session.offer.description
    rounds: asyncio.Queue[messages.RoundDone] = asyncio.Queue()
    listener = asyncio.create_task(_listen(control, rounds))
    bandwidth, data_bytes, curve, scan_ns = Bandwidth(), 0, DirtyCurve(), 0
    try:
        if not session.shared:
            bandwidth, data_bytes = await _measure_link(session, rounds)
            curve, scan_ns = await _measure_guest(session)
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)

    device_bytes = sum(device.state_bytes for device in description.devices)

    def predict(dirty_pages: int) -> Prediction:
        return env.knowledge.predict(
            guest,
            class_key(description),
            session.bases(dirty_pages, device_bytes, scan_ns, bandwidth),
            coverage=parameters.prediction_coverage_pct / 100,
            bandwidth_known=True,
        )

    played = _play(predict, limit_of(parameters), bandwidth, curve, scan_ns, data_bytes)
    return {
        "guest": guest,
        "destination": session.welcome.host,
        **played,
        "bandwidth_bytes_per_s": bandwidth.bytes_per_s,
        "dirty_pages_within_1s": int(curve.pages_within(1_000_000_000)),
    }


async def _listen(control: ControlChannel, rounds: asyncio.Queue[messages.RoundDone]) -> None:
    while True:
        message = (await control.receive()).message
        if isinstance(message, messages.RoundDone):
            rounds.put_nowait(message)


async def _measure_link(session: Session, rounds: asyncio.Queue[messages.RoundDone]) -> tuple[Bandwidth, int]:
    """Send some of the guest's pages as a round that nobody keeps. Returns also the bytes that a first round holds."""
    runs = await in_thread(session.memory.data_runs)
    bandwidth = Bandwidth()
    burst: Runs = split_runs(runs, _BURST_PAGES)[0] if len(runs) else runs
    for number in (1, 2):  # the first fills the destination's memory for the first time, as the first round will
        begin_ns = time.monotonic_ns()
        sent = await session.sender.send_round(number, burst)
        session.connection.control.send(
            messages.RoundEnd(round=number, pages=sent.normal_pages, zero_pages=sent.zero_pages)
        )
        try:
            async with asyncio.timeout(60.0):
                await rounds.get()
        except TimeoutError as error:
            raise MigrationError(f"{session.connection.where} did not acknowledge a burst of pages") from error
        bandwidth.add(sent.normal_pages, sent.wire_bytes, time.monotonic_ns() - begin_ns)
    return bandwidth, count_pages(runs) * PAGE_SIZE if len(runs) else 0


async def _measure_guest(session: Session) -> tuple[DirtyCurve, int]:
    """Sample how many unique pages the guest dirties within growing times. Returns also what a scan costs (ns)."""
    curve, log = DirtyCurve(), session.tracking.log
    seen: npt.NDArray[np.bool_] = np.zeros(session.memory.pages, np.bool_)
    await in_thread(log.collect)
    begin_ns = time.monotonic_ns()
    scan_ns = 0
    for sample_s in _SAMPLES_S:
        await asyncio.sleep(max(0.0, sample_s - (time.monotonic_ns() - begin_ns) / 1e9))
        runs, scan_ns = await in_thread(log.collect_with_cost)
        seen[indices_of(runs)] = True
        curve.add(time.monotonic_ns() - begin_ns, int(seen.sum()))
    return curve, scan_ns


def _play(
    predict: Callable[[int], Prediction],
    limit_ns: int,
    bandwidth: Bandwidth,
    curve: DirtyCurve,
    scan_ns: int,
    data_bytes: int,
) -> dict[str, Any]:
    """Simulate the rounds with what was measured."""
    played = play(
        lambda dirty_pages: predict(dirty_pages).upper_ns < limit_ns, bandwidth.for_bytes, curve, data_bytes, scan_ns
    )
    prediction = predict(played.dirty_pages)
    explained = prediction.explain(limit_ns)
    return {
        "fits": played.fits,
        "reason": f"it fits after about {played.rounds} round{'' if played.rounds == 1 else 's'}: {explained}"
        if played.fits
        else f"it does not fit, and more rounds do not help: {explained}; raise --downtime-limit or lower the load",
        "predicted_ns": prediction.total_ns,
        "predicted_upper_ns": prediction.upper_ns,
        "limit_ns": limit_ns,
        "parts_ns": prediction.parts(),
        "total_ns": played.elapsed_ns + prediction.total_ns,
        "rounds": played.rounds,
    }
