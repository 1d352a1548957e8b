"""The last seen content of the store, as documents: read once, then kept up to date from a watch.

    read_all -> put, put, ...   watch -> apply, apply, ...
                         \\        /
                          Mirror  -> placement, planner, jobs

Decisions are made on the mirror, which may be behind; the transactions that carry them out compare the revisions that
it saw, so that a decision on old news changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, TypeAlias

from migrated.base.errors import DocumentError
from migrated.fleet.keys import Keys, last_part
from migrated.fleet.model import (
    Cordon,
    Document,
    Fence,
    GuestDocument,
    HostDocument,
    HostSlots,
    JobSpec,
    JobState,
    JobStep,
    Ownership,
    WorkerClaim,
    parse,
)
from migrated.fleet.store import Change, Entry, Unchanged

NO_SLOTS: Final = HostSlots()
UNKNOWN_LINK_BYTES_PER_S: Final = 110 << 20
"""What a link counts for while nobody has measured it: one gigabit."""


_Table: TypeAlias = tuple[type[Document], dict[str, Any]]


class _Place(NamedTuple):
    """The collection that holds the document of a key, and its name there."""

    model: type[Document]
    documents: dict[str, Any]
    name: str


class Mirror:
    """The documents by their names, and the revisions at which they were written.

    Attributes:
        hosts, cordons, fences, slots: by host.
        guests, owners: by guest.
        specs, states, workers: by job.
        steps: by job, then by guest.
        by_owner: guests by the host that owns them.
        by_previous: guests by the host that has handed them over, and still has them until the owner runs them.
        by_group: guests by the group that they are kept apart in.
        problems: a sentence for each key that does not hold what belongs there.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys: Final = keys
        self.hosts: dict[str, HostDocument] = {}
        self.cordons: dict[str, Cordon] = {}
        self.fences: dict[str, Fence] = {}
        self.slots: dict[str, HostSlots] = {}
        self.guests: dict[str, GuestDocument] = {}
        self.owners: dict[str, Ownership] = {}
        self.specs: dict[str, JobSpec] = {}
        self.states: dict[str, JobState] = {}
        self.workers: dict[str, WorkerClaim] = {}
        self.steps: dict[str, dict[str, JobStep]] = defaultdict(dict)
        self.by_owner: dict[str, set[str]] = defaultdict(set)
        self.by_previous: dict[str, set[str]] = defaultdict(set)
        self.by_group: dict[str, set[str]] = defaultdict(set)
        self.problems: dict[str, str] = {}
        self._tables: dict[str, _Table] = {
            "hosts": (HostDocument, self.hosts),
            "cordons": (Cordon, self.cordons),
            "fences": (Fence, self.fences),
            "slots": (HostSlots, self.slots),
            "guests": (GuestDocument, self.guests),
            "owners": (Ownership, self.owners),
        }
        self._of_jobs: dict[str, _Table] = {
            "spec": (JobSpec, self.specs),
            "state": (JobState, self.states),
            "worker": (WorkerClaim, self.workers),
        }
        self._revisions: dict[str, int] = {}
        self._features: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._free: dict[str, int] = {}
        """Memory that each host can still promise, as far as it was asked for."""

    def apply(self, changes: Iterable[Change]) -> None:
        """Take changes from a watch. One that is older than what is known changes nothing."""
        for change in changes:
            if change.revision > self._revisions.get(change.key, 0):
                if change.entry is None:
                    self._forget(change.key)
                else:
                    self.put(change.entry)

    def put(self, entry: Entry) -> None:
        """Take an entry."""
        self._forget(entry.key)
        self._revisions[entry.key] = entry.revision
        place = self._place_of(entry.key)
        if place is None:
            return
        try:
            document = parse(place.model, entry.key, entry.value)
        except DocumentError as error:
            self.problems[entry.key] = str(error)
            return
        if isinstance(document, HostDocument | GuestDocument) and document.cpu_features:
            # The same hundred words for nearly every host and guest: one copy is kept of them.
            features = self._features.setdefault(document.cpu_features, document.cpu_features)
            document = document.model_copy(update={"cpu_features": features})
        self._keep(place, document)

    def part(self, host: str, job: str | None = None) -> Mirror:
        """Return a mirror of what the plan for one host needs, small enough to be handed to another process: all hosts,
        the guests that ``host`` owns, those of their groups, and the job."""
        keys, guests = self.keys, set(self.by_owner.get(host, ()))
        groups = {self.guests[guest].group for guest in guests if guest in self.guests}
        guests.update(*(self.by_group.get(group, ()) for group in groups if group is not None))
        wanted = [*map(keys.host, self.hosts), *map(keys.cordon, self.cordons), *map(keys.fence, self.fences)]
        wanted += [*map(keys.slots_of, self.slots), *map(keys.owner, guests), *map(keys.guest, guests)]
        if job is not None:
            wanted += [keys.job_spec(job), keys.job_state(job), keys.job_worker(job)]
            wanted += [keys.job_step(job, guest) for guest in self.steps[job]]
        found = Mirror(keys)
        for key in wanted:
            place = self._place_of(key)
            if place is not None and place.name in place.documents:
                found._take(key, place.documents[place.name], self._revisions[key])
        return found

    def _take(self, key: str, document: Document, revision: int) -> None:
        self._revisions[key] = revision
        place = self._place_of(key)
        if place is not None:
            self._keep(place, document)

    def _keep(self, place: _Place, document: Document) -> None:
        place.documents[place.name] = document
        self._index(place.name, document)

    def changed_since(self, before: Mirror) -> list[str]:
        """The keys that are not as an earlier mirror has them."""
        keys = self._revisions.keys() | before._revisions.keys()
        return sorted(key for key in keys if self.unchanged(key) != before.unchanged(key))

    def unchanged(self, key: str) -> Unchanged:
        """The compare that holds while a key is as it was seen here."""
        return Unchanged(key, self._revisions.get(key, 0))

    def _forget(self, key: str) -> None:
        self._revisions.pop(key, None)
        self.problems.pop(key, None)
        place = self._place_of(key)
        if place is not None:
            self._unindex(place.name, place.documents.pop(place.name, None))

    def _index(self, name: str, document: Document) -> None:
        match document:
            case Ownership(owner=owner, previous=previous):
                self.by_owner[owner].add(name)
                if previous is not None:
                    self.by_previous[previous].add(name)
            case GuestDocument(group=str(group)):
                self.by_group[group].add(name)
            case HostDocument() | HostSlots():
                self._free.pop(name, None)

    def _unindex(self, name: str, document: Document | None) -> None:
        match document:
            case Ownership(owner=owner, previous=previous):
                self.by_owner[owner].discard(name)
                if previous is not None:
                    self.by_previous[previous].discard(name)
            case GuestDocument(group=str(group)):
                self.by_group[group].discard(name)
            case HostDocument() | HostSlots():
                self._free.pop(name, None)

    def _place_of(self, key: str) -> _Place | None:
        """Return the place of a key's document; None for a key of an unknown kind."""
        kind, _, rest = key.removeprefix(self.keys.prefix).partition("/")
        if kind == "jobs":
            job, _, part = rest.partition("/")
            if part.startswith("steps/"):
                return _Place(JobStep, self.steps[job], last_part(key))
            known = self._of_jobs.get(part)
            return None if known is None else _Place(*known, job)
        known = self._tables.get(kind)
        return None if known is None else _Place(*known, rest)

    def slots_of(self, host: str) -> HostSlots:
        """The migrations that are promised to a host."""
        return self.slots.get(host, NO_SLOTS)

    def free_bytes(self, host: HostDocument) -> int:
        """Return the memory that a host of this mirror can still promise."""
        free = self._free.get(host.name)
        if free is None:
            promised = self.slots_of(host.name).inbound_bytes
            free = self._free[host.name] = max(0, host.memory_bytes - host.used_bytes - promised)
        return free


def link_of(host: HostDocument) -> int:
    """Return the throughput of a host's link (bytes per second)."""
    return host.link_bytes_per_s or UNKNOWN_LINK_BYTES_PER_S
