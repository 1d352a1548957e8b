"""The names of a fleet's keys, all below one prefix.

    hosts/HOST             leased   what a host says of itself                        HostDocument
    cordons/HOST                    it takes no guests in                             Cordon
    fences/HOST                     it surely runs nothing: said by an operator       Fence
    slots/HOST                      migrations and memory that are promised there     HostSlots
    guests/GUEST                    what a guest needs, and what moving it will cost  GuestDocument
    owners/GUEST                    the host that may run it                          Ownership
    jobs/JOB/spec                   what was asked                                    JobSpec
    jobs/JOB/state                  how far it is                                     JobState
    jobs/JOB/worker        leased   the daemon that carries it on                     WorkerClaim
    jobs/JOB/steps/GUEST            one guest of it                                   JobStep

No key grows with the fleet: what there is one of for each guest or host has a key for each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys below ``prefix``, which ends in a slash (``/migrated/lab/``)."""

    prefix: str

    @property
    def hosts(self) -> str:
        """The prefix of all hosts."""
        return f"{self.prefix}hosts/"

    @property
    def cordons(self) -> str:
        """The prefix of all cordons."""
        return f"{self.prefix}cordons/"

    @property
    def fences(self) -> str:
        """The prefix of all fences."""
        return f"{self.prefix}fences/"

    @property
    def slots(self) -> str:
        """The prefix of the slots of all hosts."""
        return f"{self.prefix}slots/"

    @property
    def guests(self) -> str:
        """The prefix of all guests."""
        return f"{self.prefix}guests/"

    @property
    def owners(self) -> str:
        """The prefix of the owners of all guests."""
        return f"{self.prefix}owners/"

    @property
    def jobs(self) -> str:
        """The prefix of all jobs."""
        return f"{self.prefix}jobs/"

    def host(self, host: str) -> str:
        """The key of a host."""
        return f"{self.hosts}{host}"

    def cordon(self, host: str) -> str:
        """The key of a host's cordon."""
        return f"{self.cordons}{host}"

    def fence(self, host: str) -> str:
        """The key of a host's fence."""
        return f"{self.fences}{host}"

    def slots_of(self, host: str) -> str:
        """The key of a host's slots."""
        return f"{self.slots}{host}"

    def guest(self, guest: str) -> str:
        """The key of a guest."""
        return f"{self.guests}{guest}"

    def owner(self, guest: str) -> str:
        """The key of a guest's owner."""
        return f"{self.owners}{guest}"

    def job_spec(self, job: str) -> str:
        """The key of what was asked of a job."""
        return f"{self.jobs}{job}/spec"

    def job_state(self, job: str) -> str:
        """The key of a job's state."""
        return f"{self.jobs}{job}/state"

    def job_worker(self, job: str) -> str:
        """The key of a job's worker."""
        return f"{self.jobs}{job}/worker"

    def job_steps(self, job: str) -> str:
        """The prefix of a job's steps."""
        return f"{self.jobs}{job}/steps/"

    def job_step(self, job: str, guest: str) -> str:
        """The key of one guest of a job."""
        return f"{self.job_steps(job)}{guest}"


def last_part(key: str) -> str:
    """The last part of a key: the host's or the guest's name."""
    return key.rpartition("/")[2]
