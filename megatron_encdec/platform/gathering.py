"""Coming together for a meeting (`meeting.py`): member 0 listens, the others look for it, messages go over links.

    1. `Host`    member 0: waits for all, says who has not come, lets all go or tells them why they end
    2. `Guest`   any other member: finds member 0, says who it is, waits for its word
    3. `Met`     what both find

A member says who it is (hello), is welcome, answers that it is still here, and waits for `go` or `end`.
"""

import contextlib
import os
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field

from megatron_encdec.platform.errors import NotMet, RunFailed, UserError
from megatron_encdec.platform.link import (
    REPLY_SECONDS,
    Link,
    allow_files,
    interface_towards,
    is_loopback,
    is_ours,
    listen,
)
from megatron_encdec.platform.ranks import Step, host_name

NOTICE_SECONDS = 30.0  # between two lines that say who has not come
TELL_SECONDS = 10.0  # for telling the others of a mistake, if they come
STOP_SECONDS = 1.0  # and of a signal
_PORTS = 8  # that are tried, from the first one on
_PAUSES = 0.05, 2.0  # seconds, the first and the longest, between two tries of all ports


@dataclass(frozen=True)
class Met:
    """What a meeting found: member 0's address as others reach it, its offer, the hosts by address; the connections
    that stand: at member 0 one to each other member, elsewhere one to member 0."""

    address: str = "127.0.0.1"
    offer: dict = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    links: dict[int, Link] = field(default_factory=dict)

    def close(self) -> None:
        """Let go of the connections."""
        for link in self.links.values():
            link.close()

    def choose_interface(self) -> str:
        """Name the network interface on the way to member 0 to gloo and NCCL, unless the user has named one; the one
        that gloo takes. By itself gloo takes what the host's own name resolves to, which may be 127.0.1.1."""
        interface = interface_towards(self.address)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if not self.address.startswith("127."):
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        return os.environ.get("GLOO_SOCKET_IFNAME", "of the host's name")


class Host:
    """Member 0 of a meeting of `party` (a `meeting.Party`). end: why all that come have to end."""

    def __init__(self, party, offer: dict, end: dict | None = None):
        self.party, self._offer, self._end = party, offer, end
        self._come: dict[int, Link] = {}
        self._here: set[int] = set()  # those that have answered the welcome: who only said its name may be gone by then
        self._hosts: dict[int, str] = {}
        self._strangers: dict[str, str] = {}  # host -> its job
        allow_files(4 * party.members)
        self._selector = selectors.DefaultSelector()
        self._listener = listen(party.port, _PORTS, min(party.members, 4096))
        if self._listener is None:
            raise UserError(f"ports {party.port} to {party.port + _PORTS - 1} of {host_name()} are all taken; set "
                            "MASTER_PORT to another one, the same on all hosts")
        self._selector.register(self._listener, selectors.EVENT_READ)

    def complete(self, until: float) -> Met:
        """Wait for all the others."""
        begun = time.monotonic()
        notice = begun + NOTICE_SECONDS
        seconds = until - begun
        while not self._all_are_here():
            for key, _ in self._selector.select(max(0.0, min(until, notice) - time.monotonic())):
                self._accept() if key.fileobj is self._listener else self._hear(key.fileobj)
            now = time.monotonic()
            if self._end:
                until = min(until, now + (TELL_SECONDS if self._end["code"] == 2 else STOP_SECONDS))
            if now > until:
                break
            if now > notice:
                notice += NOTICE_SECONDS
                self._say(f"after {now - begun:.0f} s {self._missing()}; giving up after {seconds:.0f} s")
        if self._end:
            raise self.party.told(self._end)
        if not self._all_are_here():
            text = f"after {seconds:.0f} s {self._missing()}"
            self.tell(end={"code": 1, "text": text})
            raise NotMet(text)
        return self._go()

    def tell(self, **message) -> None:
        """To all that have come."""
        for link in list(self._come.values()):
            link.send(**message)

    def close(self) -> None:
        """Stop listening; the connections stay with `Met`."""
        self._selector.close()
        self._listener.close()

    def _all_are_here(self) -> bool:
        return len(self._come if self._end else self._here) == self.party.members - 1

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            self._selector.register(Link(self._listener.accept()[0]), selectors.EVENT_READ)

    def _hear(self, link: Link) -> None:
        for message in link.received():
            if "job" in message and isinstance(message.get("member"), int):
                self._receive(link, message)
            elif "end" in message and link in self._come.values():
                self._finish(message["end"])
            elif "here" in message:
                self._here |= {member for member, other in self._come.items() if other is link}
        if link.closed:
            self._selector.unregister(link)
            link.close()
            for member in [member for member, other in self._come.items() if other is link and not self._end]:
                del self._come[member]
                self._here.discard(member)
                self._say(f"{self.party.unit} {member} on {self._hosts.pop(member)} had come and is gone; waiting for "
                          "it to come again")

    def _receive(self, link: Link, hello: dict) -> None:
        """Someone says who it is."""
        party, member, host = self.party, hello.get("member"), hello.get("host")
        if hello["job"] != party.job:
            self._strangers[host] = hello["job"]
            link.send(stranger=party.job)
            return
        name = f"{party.unit} {member} on {host}"
        self._come_before(member, host)
        self._come[member], self._hosts[member] = link, host
        if end := hello.get("end"):
            self._finish({**end, "text": f"{name}: {end['text']}"} if end["code"] == 2 else end)
        elif hello.get("terms") != party.terms:
            self._finish({"code": 2, "text": f"{name} was started with {_words(hello.get('terms'))}, {party.unit} 0 on "
                          f"{host_name()} with {_words(party.terms)}: the same numbers on all"})
        link.send(**({"end": self._end} if self._end else {"welcome": True}))

    def _come_before(self, member: int, host: str) -> None:
        """Two that say they are the same member: the job is ended."""
        if member in self._come or not 0 < member < self.party.members:
            other = self._hosts.get(member, host_name())
            self._finish({"code": 2, "text": f"two processes say they are {self.party.unit} {member} of "
                          f"{self.party.members}: on {other} and on {host}"})

    def _finish(self, end: dict) -> None:
        """The meeting ends with the first reason for it."""
        if self._end is None:
            self._end = end
            self.tell(end=end)

    def _say(self, text: str) -> None:
        if self._end is None:
            print(f"megatron-encdec: {text}", file=sys.stderr, flush=True)

    def _missing(self) -> str:
        party = self.party
        missing = [member for member in range(1, party.members) if member not in self._here]
        step = Step.read()
        hosts = set(step.hosts if step else ()) - {host_name(), *self._hosts.values()}
        nobody = f" (none from {', '.join(sorted(hosts)[:20])})" if hosts else ""
        strangers = "".join(f"; {host} came for another job, {job}" for host, job in self._strangers.items())
        elsewhere = "" if is_ours(party.address) else f"; {party.address} is no address of this host, {host_name()}"
        return (f"{len(missing)} of {party.members} {party.unit}s have not come to {party.place}: {party.unit} "
                f"{_spans(missing)}{nobody}{strangers}{elsewhere}")

    def _go(self) -> Met:
        ends = [link.addresses for link in self._come.values()]
        ours = next((own for own, _ in ends if not is_loopback(own)), ends[0][0])
        hosts = {other: host for (_, other), host in zip(ends, self._hosts.values(), strict=True)
                 if is_loopback(other) == is_loopback(ours)}
        hosts[ours] = host_name()
        self.tell(go={"address": ours, "offer": self._offer, "hosts": hosts})
        return Met(ours, self._offer, hosts, self._come)


class Guest:
    """Any other member. end: why all have to end, for member 0 to tell."""

    def __init__(self, party, end: dict | None = None):
        self.party, self._hello = party, {**party.hello, "end": end}
        self._link: Link | None = None
        self._messages: list[dict] = []  # that have come and were not looked at
        self._last, self._stranger = "no answer", ""

    def complete(self, until: float) -> Met:
        """Find member 0, and wait until it says that all are there."""
        begun = time.monotonic()
        notice, pause, attempt = begun + NOTICE_SECONDS, _PAUSES[0], 0
        while time.monotonic() < until:
            port = self.party.port + attempt % _PORTS
            answer = self._ask(port, min(until, time.monotonic() + REPLY_SECONDS))
            if "end" in answer:
                raise self.party.told(answer["end"])
            if "welcome" in answer:
                self._link.send(here=True)
                return self._wait()
            attempt = attempt + 1 if answer.get("next") else 0
            if attempt % _PORTS == 0:  # all were tried
                time.sleep(pause)
                pause = min(1.5 * pause, _PAUSES[1])
            if time.monotonic() > notice:
                notice += NOTICE_SECONDS
                self._say(f"{self._nobody()}, for {time.monotonic() - begun:.0f} s; trying for {until - begun:.0f} s")
        text = f"{self._nobody()}, within {until - begun:.0f} s; MASTER_ADDR has to name the host of " \
               f"{self.party.unit} 0"
        raise self._failure(text)

    def tell(self, **message) -> None:
        """To member 0, if it has been found."""
        if self._link:
            self._link.send(**message)

    def close(self) -> None:
        """Nothing; the connection stays with `Met`."""

    def _ask(self, port: int, until: float) -> dict:
        """What is said at `port`; {"next": True} if that is nothing of ours, {} if the host cannot be reached."""
        try:
            connection = socket.create_connection((self.party.address, port), timeout=REPLY_SECONDS)
            if connection.getsockname() == connection.getpeername():  # where nobody listens the system may do that
                connection.close()
                return {"next": True}
            self._link = Link(connection)
        except OSError as error:
            self._last = error.strerror or str(error)
            return {"next": True} if isinstance(error, ConnectionRefusedError) else {}
        self._link.send(**self._hello)
        message = self._next(until)
        if message and "stranger" not in message:
            return message
        if message:
            self._stranger = f"; another job meets at port {port}: {message['stranger']}"
        else:
            self._last = f"what listens at port {port} is no meeting of this program"
        self._link.close()
        self._link = None
        return {"next": True}

    def _wait(self) -> Met:
        message = self._next()
        if message is None:
            raise self._failure(f"{self.party.unit} 0, at {self.party.address}, is gone before all {self.party.unit}s "
                                "had come")
        if "end" in message:
            raise self.party.told(message["end"])
        go = message["go"]
        return Met(go["address"], go["offer"], go["hosts"], {0: self._link})

    def _next(self, until: float | None = None) -> dict | None:
        """The next message of member 0; None where it is gone, or at `until`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._link, selectors.EVENT_READ)
            while not self._messages and not self._link.closed and (until is None or time.monotonic() < until):
                selector.select(until and max(0.0, until - time.monotonic()))
                self._messages += self._link.received()
        return self._messages.pop(0) if self._messages else None

    def _nobody(self) -> str:
        party = self.party
        return (f"{party.unit} {party.member} on {host_name()} finds nobody of its job ({party.job}) at "
                f"{party.place}-{party.port + _PORTS - 1}: {self._last}{self._stranger}")

    def _failure(self, text: str) -> RunFailed:
        return NotMet(text) if self.party.speaks else RunFailed(text)

    def _say(self, text: str) -> None:
        if self.party.speaks:
            print(f"megatron-encdec: {text}", file=sys.stderr, flush=True)


def _spans(numbers: list[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _words(terms: dict | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (terms or {}).items()) or "nothing"
