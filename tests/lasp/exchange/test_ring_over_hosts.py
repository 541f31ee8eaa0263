"""The ring over several hosts: the same bits as on one, and one message between two of them."""

import contextlib
import ctypes
from collections import Counter
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp import shard
from lasp.exchange import hosts
from tests.lasp import cases, sharded
from tests.lasp.exchange.peer_memory import memory_within
from tests.lasp.sharded import LAYOUTS, Problem

# The host of every rank.
FOUR = [(0, 0, 1, 1), (0, 1, 1, 1), (0, 1, 1, 2), (0, 0, 0, 1)]
EIGHT = [(0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 0, 0, 1, 1), (0, 1, 1, 1, 2, 2, 2, 3)]


def by_token(H, T):
    """Decays per token, some of which end all states."""
    generator = torch.Generator().manual_seed(3)
    rates = -torch.rand(1, T, H, generator=generator)
    rates[:, T // 2] = float("-inf")
    return rates


def problems(size, layout):
    total = 16 * size
    even = tuple(shard.split_lengths(total, size, layout))
    uneven = (total - 6 * (size - 2) - 2, *(6,) * (size - 2), 2)
    empty = {4: (0, 48, 0, 16), 8: (0, 0, 64, 0, 0, 32, 32, 0)}[size]
    options = dict(dtype=torch.float32)
    made = [Problem(total, "ring", layout, cut, **options) for cut in (None, uneven, empty)]
    made += [
        Problem(total, "ring", layout, cut, sharded.documents_that(meet, cut or even, layout),
                **options)
        for cut, meet in [(None, "on"), (None, "across"), (uneven, "both"), (empty, "both")]
    ]  # fmt: skip
    made.append(Problem(total, "ring", layout, rates=-800.0, **options))
    made.append(Problem(total, "ring", layout, rates=by_token, **options))
    return made


def in_three_ways(group, problems, places, delay):
    """Results by messages alone, in one host's memory, over the hosts, and over them once more with
    random delays; and the messages that this rank sent there."""
    found = []
    for of_hosts, late in [(None, 0), ((0,) * len(places), 0), (places, 0), (places, delay)]:
        alone = mock.patch("lasp.exchange.ring.find_buffer", return_value=None)
        with contextlib.ExitStack() as stack:
            if of_hosts is None:
                stack.enter_context(alone)
            else:
                buffer, targets = stack.enter_context(memory_within(group, of_hosts, late))
                assert of_hosts is places or len(buffer.ranks) == len(places)
            found.append(sharded.run_all(group, problems))
    return found, targets


def check_bits(pool, layout, places):
    size = len(places)
    made = problems(size, layout)
    outcomes = pool.run(in_three_ways, made, places, 0.004, size=size)
    sent = Counter()
    for rank, (found, targets) in enumerate(outcomes):
        for results in found[1:]:
            for problem, now, before in zip(made, results, found[0], strict=True):
                for name in before:
                    assert torch.equal(now[name], before[name]), (rank, problem, name)
        sent.update((rank, target) for target in targets)
    # Between hosts and nowhere else, but among ranks that are alone on one.
    boundaries = {r for r, (a, b) in enumerate(pairwise(places)) if a != b}
    assert {min(pair) for pair in sent} == boundaries
    assert all(abs(a - b) == 1 for a, b in sent)

    class Done:
        def run(self, *args, **options):
            return [found[3] for found, _ in outcomes]

    sharded.check(Done(), size, *made)


@pytest.mark.parametrize("places", FOUR, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_those_of_one_level_over_4_ranks(pool, layout, places):
    check_bits(pool, layout, places)


@pytest.mark.parametrize("places", EIGHT, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_those_of_one_level_over_8_ranks(pool8, layout, places):
    check_bits(pool8, layout, places)


def counted(group, layout, places, documents):
    """(ranks to which messages went, states sent in memory), of a forward and of a backward."""
    q, k, v, log_decay, _ = cases.make_inputs(16, dtype=torch.float32)
    q.requires_grad_()
    k.requires_grad_()
    boundaries = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    options = dict(group=group, layout=layout, cu_seqlens=boundaries)
    found = []
    with memory_within(group, places) as (buffer, targets):
        o = lasp.lightning_attention(q, k, v, log_decay, **options)
        found.append((list(targets), buffer.sent))
        o.sum().backward()
        found.append((targets[len(found[0][0]) :], buffer.sent - found[0][1]))
    return found


@pytest.mark.parametrize(
    "layout, documents, forward",
    [
        ("contiguous", None, [([], 1), ([2], 0), ([], 1), ([], 0)]),
        ("zigzag", None, [([], 1), ([2], 1), ([1], 1), ([], 1)]),
        # The first document ends where the host does.
        ("contiguous", (0, 32, 64), [([], 1), ([], 0), ([], 1), ([], 0)]),
    ],
)
def test_one_message_crosses_between_hosts(pool, layout, documents, forward):
    """In each direction of the sequence; all other states go in memory."""
    outcomes = pool.run(counted, layout, (0, 0, 1, 1), documents, size=4)
    assert [there for there, _ in outcomes] == forward
    if layout == "contiguous":
        forward = [([3 - target for target in targets], n) for targets, n in reversed(forward)]
    assert [back for _, back in outcomes] == forward


def test_a_part_knows_whether_indices_differ(pool):
    for parts in pool.run(parts_with_equal_indices, size=3):
        assert parts == ((range(0, 2), False), (range(2, 3), True))


def parts_with_equal_indices(group):
    rank = dist.get_rank(group)
    with (
        mock.patch.object(hosts, "_host_number", return_value=rank // 2),
        mock.patch.object(hosts, "_pci_address", return_value=(1 << 40) + rank),
        mock.patch.object(hosts, "_reaches_all", lambda device, addresses: len(addresses) <= 2),
    ):
        parts = hosts.split_by_host(group, mock.Mock(index=0))
    return tuple(tuple(part) for part in parts)


class Nvml:
    """libnvidia-ml with two GPUs that may be peers, and others that it does not show."""

    GPUS = {b"00000000:1b:00.0": 7, b"00010002:43:05.0": 9}

    def __init__(self, peers, starts=True):
        self._peers, self._starts, self.is_open = peers, starts, False

    def nvmlInit_v2(self):
        self.is_open = self._starts
        return 0 if self._starts else 9

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetHandleByPciBusId_v2(self, name, handle):
        handle._obj.value = self.GPUS.get(name, 0)
        return 0 if name in self.GPUS else 6

    def nvmlDeviceGetP2PStatus(self, one, other, capability, status):
        assert {one.value, other.value} == {7, 9}
        status._obj.value = 0 if capability in self._peers else 5
        return 0


OWN, OTHER, HIDDEN = 0x1B00, 0x1_0002_4305, 0x2B00


@pytest.mark.parametrize(
    "addresses, nvml, reached",
    [
        ([OWN, OTHER], Nvml({0, 1}), True),
        ([OWN, OTHER], Nvml({0}), False),
        ([OWN, OTHER], Nvml({1}), False),
        ([OWN, OTHER], Nvml({0, 1}, starts=False), False),
        ([OWN, OTHER], OSError(), False),
        ([OWN, HIDDEN], Nvml({0, 1}), False),
        ([OWN, OWN], Nvml({0, 1}), False),
        ([OWN], OSError(), True),
    ],
)
def test_nvml_tells_of_gpus_that_cuda_hides(addresses, nvml, reached):
    properties = mock.Mock(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    loads = dict(side_effect=nvml) if isinstance(nvml, OSError) else dict(return_value=nvml)
    with (
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch.object(ctypes, "CDLL", **loads),
    ):
        assert hosts._reaches_all(mock.Mock(index=0), addresses) == reached
    assert not isinstance(nvml, Nvml) or not nvml.is_open


def test_cuda_tells_of_gpus_that_it_shows():
    def properties(device):
        return mock.Mock(
            pci_domain_id=0, pci_bus_id=getattr(device, "index", device), pci_device_id=0
        )

    with (
        mock.patch("torch.cuda.get_device_properties", properties),
        mock.patch("torch.cuda.device_count", return_value=3),
        mock.patch("torch.cuda.can_device_access_peer", side_effect=lambda a, b: (a, b) == (0, 2)),
        mock.patch.object(ctypes, "CDLL", side_effect=AssertionError),
    ):
        device = mock.Mock(index=0)
        assert hosts._reaches_all(device, [0, 2 << 8])
        assert not hosts._reaches_all(device, [0, 1 << 8])


def test_processes_of_this_host_have_one_number(pool):
    assert len(set(pool.run(host_number, size=2))) == 1


def host_number(group):
    with mock.patch("socket.gethostname", return_value="another"):
        other = hosts._host_number()
    assert other != hosts._host_number()
    return hosts._host_number()
