"""How the processes of a job find each other, before there is any process group. Plain sockets, nothing of torch.

    1. `Party.of_ranks(...)`                who meets, where, and what their job is called
    2. `with party.telling():`              around what may fail before: the others are told, and do not wait
    3. `party.meet(offer)`  ->  `Met`       once all are there; else a line that says who is not

Member 0 listens at the first free port from an agreed one on. The others try these ports in turn and say what their job
is called before they count: two jobs that begin at the same port both find their own, and nobody joins another's.
What has to be equal for all (how many they are) is compared; then member 0 tells everyone its offer (the port of the
store that the process group is made with) and its address as the others reach it, which decides the interface.

SIGTERM, SIGUSR1 and SIGUSR2 end a meeting at once, for all that have come: nothing is to be saved yet.
"""

import contextlib
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_encdec.platform import gathering
from megatron_encdec.platform.errors import AgreedError, RunFailed, Stopped, UserError, stopped_code
from megatron_encdec.platform.gathering import Guest, Host, Met
from megatron_encdec.platform.ranks import RankEnvironment, Step, host_name, seconds_of
from megatron_encdec.platform.signals import StopSignals

JOB = "MEGATRON_ENCDEC_JOB"  # variable: what the job of these ranks is called; our launcher sets it
SECONDS = "MEGATRON_ENCDEC_MEETING_SECONDS"  # variable: until a meeting that is not complete fails; 600
PORT = 29500  # where a meeting begins to look for a free port, if nothing says otherwise


@dataclass(frozen=True)
class Party:
    """Who meets where: `member` of `members`, each one a `unit` ("rank", "node"), of the job called `job`, at `address`
    from `port` on. terms: what has to be equal for all. speaks: whether this member says that it waits."""

    job: str
    unit: str
    member: int
    members: int
    address: str
    port: int
    terms: dict = field(default_factory=dict)
    speaks: bool = True

    @classmethod
    def of_ranks(cls, environment: RankEnvironment, name: str) -> "Party":
        """All ranks of the job. name: what it is called where no launcher has a name for it."""
        get, step = os.environ.get, Step.read()
        job, address, port = get(JOB) or name, get("MASTER_ADDR") or "127.0.0.1", int(get("MASTER_PORT") or PORT)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # whose agent has taken the port itself
            job = f"torchrun {get('TORCHELASTIC_RUN_ID')} {port} {get('TORCHELASTIC_RESTART_COUNT')}"
            port += 1
        elif JOB not in os.environ and step and step.tasks > 1:
            job, address, port = of_step(step)
        return cls(job, "rank", environment.rank, environment.world_size, address, port,
                   {"ranks": environment.world_size}, environment.local_rank == 0)

    @property
    def place(self) -> str:
        """Where they meet, for people."""
        return f"{self.address}:{self.port}"

    @property
    def hello(self) -> dict:
        return {"job": self.job, "member": self.member, "host": host_name(), "terms": self.terms}

    def meet(self, offer: dict | None = None, signals: StopSignals | None = None) -> Met:
        """Wait until all are there. offer: of member 0 to all.

        Raises `NotMet` after the time that `SECONDS` says, `AgreedError` where terms differ or another member has
        found a mistake, `Stopped` where another one got a signal; at a signal this process ends.
        """
        if self.members == 1:
            return Met(offer=offer or {})
        if signals and signals.received:
            end = _stop(self, signals.received)
            self._tell(end, gathering.STOP_SECONDS)
            raise self.told(end)
        seconds = seconds_of(SECONDS, 600, 1)
        side = Host(self, offer or {}) if self.member == 0 else Guest(self)
        with contextlib.closing(side), _leaving_at_a_signal(signals, side):
            return side.complete(time.monotonic() + seconds)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """A `UserError` inside is told to all members that come within some seconds, so that they end too; where
        member 0 makes the same mistake, it alone prints it."""
        try:
            yield
        except UserError as error:
            if self.members == 1:
                raise
            if self._tell({"code": 2, "text": str(error)}, gathering.TELL_SECONDS) == str(error) and self.member:
                raise self.told({"code": 2, "text": str(error)}) from None
            raise

    def _tell(self, end: dict, seconds: float) -> str:
        """Tell the others why all end; what member 0 says of it."""
        try:
            side = Host(self, {}, end) if self.member == 0 else Guest(self, end)
            with contextlib.closing(side):
                side.complete(time.monotonic() + seconds)
        except (UserError, RunFailed, Stopped) as error:
            return str(error)
        return ""

    def told(self, end: dict) -> Exception:
        """The error that `end` is to this member. It is printed once where all write to one place: by rank 0; by the
        launchers under srun too, but on nodes started by hand each launcher says it."""
        error = {0: Stopped, 2: AgreedError}.get(end["code"], RunFailed)(end["text"])
        error.is_said = self.unit == "node" and self.member > 0 and Step.read() is not None
        return error


def of_step(step: Step) -> tuple[str, str, int]:
    """What a job of srun is called, the address where it meets, and from which port on: another for each step."""
    address = os.environ.get("MASTER_ADDR") or (step.hosts[0] if step.hosts else "127.0.0.1")
    return f"Slurm {step.name}", address, int(os.environ.get("MASTER_PORT") or port_of(step.name))


def port_of(job: str) -> int:
    """Where a job begins to look for a free port: below those that the system gives to connections."""
    return 20000 + zlib.crc32(job.encode()) % 12000


@contextlib.contextmanager
def _leaving_at_a_signal(signals: StopSignals | None, side: Host | Guest) -> Iterator[None]:
    """At the first signal tell the others and end this process, whatever its main thread waits for."""
    def leave(number: int) -> None:
        if number == signal.SIGINT:
            print("megatron-encdec: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        end = _stop(side.party, number)
        try:
            side.tell(end=end)
        finally:
            print(end["text"], flush=True)
            os._exit(stopped_code())

    if signals is None:
        yield
        return
    with signals.at_once(leave):
        yield


def _stop(party: Party, number: int) -> dict:
    return {"code": 0, "text": f"stopped by {signal.Signals(number).name} on {host_name()} before all {party.unit}s "
                               "had met; nothing was to be saved"}
