"""The hosts of a job: which rank is on which, and whether they can reach each other.

A job on several hosts fails in ways that one host does not know: a name that resolves to the host
itself, an interface that leads nowhere, a firewall. Process groups would wait for their timeout,
and then name an address at best. So before any is made, each host says at which address gloo will
listen, and opens one connection to the next host, as gloo will: `unreachable` returns a sentence
that names the host and what to change. (NCCL chooses interfaces of its own, but lasp compares calls
over gloo in any case.)
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lasp.exchange.shared_memory import host_id

_INTERFACE = "GLOO_SOCKET_IFNAME"
# Seconds in which a connection to the next host is made.
_CONNECT_SECONDS = 15.0
_POLL_SECONDS = 0.02
# Linux: ask for an interface's IPv4 address, which starts at this byte of the answer.
_SIOCGIFADDR, _ADDRESS_AT = 0x8915, 20
_TOKEN_BYTES = 16


@dataclass(frozen=True)
class Host:
    """What a rank says of its host before the ranks meet.

    Attributes:
        name: its host name.
        identity: equal on all ranks of one host, and on no other host.
        address: at which gloo will listen; "" if that is not known.
        problem: why other hosts cannot reach it; "" if nothing is known.
    """

    name: str
    identity: str
    address: str = ""
    problem: str = ""

    @classmethod
    def here(cls, is_alone: bool) -> Host:
        """This host; if it is alone in the job, its address does not matter."""
        name = socket.gethostname()
        address, problem = ("", "") if is_alone else gloo_address()
        return cls(name, host_id() or name, address, problem)


class Hosts:
    """The hosts of a job, in the order of their first ranks.

    Args:
        of_rank: the host of each rank.
    """

    def __init__(self, of_rank: Sequence[Host]) -> None:
        self._ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(of_rank):
            self._ranks.setdefault(host.identity, []).append(rank)
        self.hosts = [of_rank[ranks[0]] for ranks in self._ranks.values()]
        names = [host.name for host in self.hosts]
        # Two hosts of one name are told apart by their addresses.
        self.names = [
            name if names.count(name) == 1 else f"{name} ({host.address or 'address unknown'})"
            for name, host in zip(names, self.hosts, strict=True)
        ]
        self._number = {
            rank: number for number, ranks in enumerate(self._ranks.values()) for rank in ranks
        }

    @property
    def num_ranks(self) -> int:
        return len(self._number)

    @property
    def are_several(self) -> bool:
        return len(self.hosts) > 1

    def number_of(self, rank: int) -> int:
        """Which of the hosts a rank is on."""
        return self._number[rank]

    def ranks_of(self, number: int) -> list[int]:
        """The ranks of a host."""
        return list(self._ranks.values())[number]

    def rank(self, rank: int) -> str:
        """A rank for a message: "rank 3", with several hosts "rank 3 on host1"."""
        where = f" on {self.names[self._number[rank]]}" if self.are_several else ""
        return f"rank {rank}{where}"

    def host(self, number: int) -> str:
        """A host for a message: "host1 (ranks 2 and 3)"."""
        return f"{self.names[number]} ({list_ranks(self.ranks_of(number))})"

    def to_json(self) -> str:
        """Everything in a text that does not repeat a host per rank."""
        hosts = [[host.name, host.identity, host.address] for host in self.hosts]
        return json.dumps([hosts, [self._number[rank] for rank in range(len(self._number))]])

    @classmethod
    def from_json(cls, text: str | bytes) -> Hosts:
        hosts, numbers = json.loads(text)
        made = [Host(*fields) for fields in hosts]
        return cls([made[number] for number in numbers])


def list_ranks(ranks: Sequence[int]) -> str:
    """Ranks for a message: "rank 1", "ranks 0, 1 and 3", "ranks 0 to 62"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 3 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}"


def gloo_address() -> tuple[str, str]:
    """(the address at which gloo will listen here, why other hosts cannot reach it), "" for what is
    not known or not wrong."""
    chosen = os.environ.get(_INTERFACE, "")
    if chosen:
        address, problem = _of_interface(chosen)
    else:
        address, problem = _of_name(socket.gethostname())
    if not problem and address and ipaddress.ip_address(address).is_loopback:
        source = f"{_INTERFACE} is {chosen}" if chosen else f"its name {socket.gethostname()!r}"
        verb = ", with" if chosen else " resolves to"
        problem = f"{source}{verb} the address {address}, which is of use inside it only"
    return address, problem


def _of_interface(names: str) -> tuple[str, str]:
    """For a value of GLOO_SOCKET_IFNAME: of several, the first one is looked at."""
    present = [name for _, name in socket.if_nameindex()]
    for name in names.split(","):
        if name not in present:
            return "", f"{_INTERFACE} is {names}, but it has the interfaces {', '.join(present)}"
    name = names.split(",")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            # It may have an IPv6 address, which gloo takes too.
            return "", ""
    return socket.inet_ntoa(answer[_ADDRESS_AT : _ADDRESS_AT + 4]), ""


def _of_name(name: str) -> tuple[str, str]:
    """For the addresses of a host name: the first one that is this host's own."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        return "", f"it cannot resolve its own name {name!r} ({reason})"
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as listening:
            listening.bind(address)
            return str(address[0]).partition("%")[0], ""
    others = ", ".join(dict.fromkeys(str(each[4][0]) for each in found))
    return "", f"its name {name!r} resolves to {others}, which is no address of it"


def unreachable(hosts: Hosts, number: int) -> str | None:
    """The sentence for a host that has said why others cannot reach it."""
    problem = hosts.hosts[number].problem
    if not problem:
        return None
    return (
        f"other hosts cannot reach {hosts.host(number)}: {problem}. On that host, enter its name "
        "and address in /etc/hosts or DNS, or name the interface that leads to the other hosts "
        f"with {_INTERFACE}."
    )


def connect_hosts(store: dist.Store, rank: int, hosts: Hosts, deadline: float) -> str | None:
    """On all ranks: a sentence if a host cannot be reached from the one before it; else None.

    The first rank of each host listens at gloo's address and connects to the next host: a number of
    connections that does not grow with the hosts, at the same time on all of them.
    """
    mine = hosts.number_of(rank)
    if hosts.ranks_of(mine)[0] == rank:
        problem = _connect_next(store, hosts, mine, deadline)
        store.set(f"connected/{mine}", problem or "")
    if rank == 0:
        texts = [store.get(f"connected/{n}").decode() for n in range(len(hosts.hosts))]
        store.set("connected", next(filter(None, texts), ""))
    return store.get("connected").decode() or None


def _connect_next(store: dist.Store, hosts: Hosts, mine: int, deadline: float) -> str | None:
    """Connect to the next host, and answer the one before; a sentence if that fails."""
    count, address = len(hosts.hosts), hosts.hosts[mine].address
    before, other = (mine - 1) % count, (mine + 1) % count
    token = secrets.token_hex(_TOKEN_BYTES)
    with contextlib.ExitStack() as stack:
        listening, port, problem = None, 0, None
        if address:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                listening = stack.enter_context(socket.create_server((address, 0), family=family))
                port = listening.getsockname()[1]
            except OSError as error:
                problem = f"{hosts.host(mine)} cannot listen at its address {address}: {error}."
        store.set(f"listening/{mine}", json.dumps([port, token]))
        port, expected = json.loads(store.get(f"listening/{other}"))
        limit = max(0.1, min(_CONNECT_SECONDS, deadline - time.monotonic()))
        outgoing = None
        if port:
            try:
                target = (hosts.hosts[other].address, port)
                outgoing = stack.enter_context(socket.create_connection(target, timeout=limit))
            except OSError as error:
                problem = _no_connection(hosts, mine, other, error.strerror or str(error))
        # Through the store: the host before may have failed, and then never connects.
        store.set(f"tried/{mine}", "" if outgoing is None else "connected")
        if listening is not None and store.get(f"tried/{before}") == b"connected":
            _answer(listening, token, limit)
        if outgoing is not None and _read_token(outgoing) != expected:
            problem = _no_connection(hosts, mine, other, "something else answers there")
    return problem


def _answer(listening: socket.socket, token: str, limit: float) -> None:
    """Accept the connection of the host before, which reports it if that fails."""
    listening.settimeout(limit)
    with contextlib.suppress(OSError):
        incoming, _ = listening.accept()
        with incoming:
            incoming.settimeout(limit)
            incoming.sendall(bytes.fromhex(token))


def _read_token(outgoing: socket.socket) -> str:
    """What the other side sends; "" if it sends nothing."""
    with contextlib.suppress(OSError):
        return outgoing.recv(_TOKEN_BYTES, socket.MSG_WAITALL).hex()
    return ""


def _no_connection(hosts: Hosts, mine: int, other: int, reason: str) -> str:
    return (
        f"{hosts.host(mine)} cannot connect to {hosts.host(other)} at {hosts.hosts[other].address} "
        f"({reason}). On both hosts, name the interface that leads to the other hosts with "
        f"{_INTERFACE}, and open all ports between the hosts."
    )
