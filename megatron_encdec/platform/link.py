"""Sockets between the hosts of a job: lines of JSON, a free port, and which interface or address is whose.

    1. `Link(socket)`                  messages both ways, without waiting
    2. `listen(first, ports, ...)`     a server at the first free port
    3. `interface_towards(address)`, `is_loopback`, `is_ours`
"""

import contextlib
import json
import resource
import socket

REPLY_SECONDS = 10.0  # for an answer at a port; what listens there may be no meeting at all
_LONGEST = 1 << 22  # bytes of a message


class Link:
    """Messages, a line of JSON each, over a connected socket. addresses: this end's and the other's. closed: the other
    end is gone, or talks otherwise."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        for level, option, value in ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # a host without power: a minute
                                     (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
                                     (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
                                     (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)):
            connection.setsockopt(level, option, value)
        self.addresses = tuple(name[0].removeprefix("::ffff:")
                               for name in (connection.getsockname(), connection.getpeername()))
        self._connection, self._text, self.closed = connection, b"", False

    def fileno(self) -> int:
        """Of the socket, for selectors."""
        return self._connection.fileno()

    def send(self, **message) -> None:
        """Send; an end that does not take it is found closed later."""
        with contextlib.suppress(OSError):
            self._connection.settimeout(REPLY_SECONDS)
            self._connection.sendall(json.dumps(message).encode() + b"\n")
            self._connection.setblocking(False)

    def received(self) -> list[dict]:
        """What has come, without waiting."""
        try:
            while len(self._text) < _LONGEST and (data := self._connection.recv(1 << 16)):
                self._text += data
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._text = self._text.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages, self.closed = [], True
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """Let go of the socket."""
        self._connection.close()


def interface_towards(address: str) -> str | None:
    """The network interface by which packets go to `address`; where that is this host's own, the one that has it."""
    import psutil

    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        own = probe.getsockname()[0]
    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if own in [one.address.partition("%")[0] for one in addresses]), None)


def listen(first: int, ports: int, backlog: int) -> socket.socket | None:
    """At the first free one of so many ports, on all interfaces; None where all are taken."""
    families = [{"family": socket.AF_INET6, "dualstack_ipv6": True}] if socket.has_dualstack_ipv6() else []
    for port in range(first, first + ports):
        for family in [*families, {}]:
            try:
                return socket.create_server(("", port), backlog=backlog, **family)
            except OSError:
                pass
    return None


def allow_files(count: int) -> None:
    """Let this process have so many sockets, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + 256:
        wanted = count + 256 if hard == resource.RLIM_INFINITY else min(count + 256, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def is_ours(address: str) -> bool:
    """Whether a socket of this host can have `address`; also where its name cannot be resolved here."""
    try:
        family, kind, _, _, end = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(end)
    except OSError as error:
        return isinstance(error, socket.gaierror)
    return True
