"""Which neighbours of a group share a host and reach each other's GPUs.

A GPU is known by its PCI address, which is the same in all processes of a host. Its index is not:
with one GPU per process in CUDA_VISIBLE_DEVICES, each of them is number 0. Memory of a GPU that
this process does not see can be mapped all the same, if the two GPUs reach each other. CUDA tells
that of the GPUs it shows to the process, NVML of the others.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from lasp.exchange import consistency, shared_memory

__all__ = ["HostRanks", "split_by_host"]

# Bits of a gathered number that hold the device index.
_INDEX_BITS = 8
# nvmlGpuP2PCapsIndex_t: read, write.
_NVML_P2P_CAPS = (0, 1)


class HostRanks(NamedTuple):
    """Neighbours in a group's order that share a host and reach each other's GPUs, or one rank.

    Attributes:
        ranks: ranks of the group.
        indices_differ: no two of them use the same device index.
    """

    ranks: range
    indices_differ: bool = True


def split_by_host(group: ProcessGroup, device: torch.device) -> tuple[HostRanks, ...]:
    """The parts of the group, in order, the same on all ranks, which all call this.

    Only neighbours are joined: where the ranks of two hosts alternate, every rank is a part. So it
    is if any rank has LASP_PEER_MEMORY=0 in its environment.
    """
    size = group.size()
    single = tuple(HostRanks(range(rank, rank + 1)) for rank in range(size))
    wanted = os.environ.get("LASP_PEER_MEMORY", "1") != "0" and torch.version.hip is None
    hosts = consistency.gather_numbers(group, _host_number() if wanted else -1)
    if min(hosts) < 0:
        return single
    number = _pci_address(device) << _INDEX_BITS | device.index
    numbers = consistency.gather_numbers(group, number)
    starts = [rank for rank in range(size) if rank == 0 or hosts[rank] != hosts[rank - 1]]
    neighbours = [range(*ends) for ends in pairwise([*starts, size])]
    own = next(ranks for ranks in neighbours if group.rank() in ranks)
    addresses = [numbers[rank] >> _INDEX_BITS for rank in own]
    reached = consistency.gather_numbers(group, int(_reaches_all(device, addresses)))
    parts: list[HostRanks] = []
    for ranks in neighbours:
        indices = {numbers[rank] % (1 << _INDEX_BITS) for rank in ranks}
        if all(reached[rank] for rank in ranks):
            parts.append(HostRanks(ranks, len(indices) == len(ranks)))
        else:
            parts += single[ranks.start : ranks.stop]
    return tuple(parts)


def _host_number() -> int:
    """Equal on all ranks of a host, or of a container: these may not see each other's processes."""
    host = shared_memory.host_id()
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt") if host]
    name = f"{socket.gethostname()} {host} {namespaces}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _pci_address(device: torch.device | int) -> int:
    """Domain, bus (8 bits) and device (8 bits) of a GPU; its index where torch does not tell."""
    found = torch.cuda.get_device_properties(device)
    if not hasattr(found, "pci_bus_id"):
        return getattr(device, "index", device)
    return (found.pci_domain_id << 8 | found.pci_bus_id) << 8 | found.pci_device_id


def _reaches_all(device, addresses):
    """True if the addresses are those of different GPUs, and the device reaches the others."""
    if len(set(addresses)) < len(addresses):
        return False
    own = _pci_address(device)
    seen = {_pci_address(index): index for index in range(torch.cuda.device_count())}
    return all(
        torch.cuda.can_device_access_peer(device.index, seen[other])
        if other in seen
        else _nvml_reaches(own, other)
        for other in addresses
        if other != own
    )


def _nvml_reaches(own: int, other: int) -> bool:
    """Whether NVML says that two GPUs read and write each other's memory; False if it cannot."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    if nvml.nvmlInit_v2() != 0:
        return False
    try:
        handles = [ctypes.c_void_p(), ctypes.c_void_p()]
        for address, handle in zip((own, other), handles, strict=True):
            name = f"{address >> 16:08x}:{address >> 8 & 0xFF:02x}:{address & 0xFF:02x}.0"
            if nvml.nvmlDeviceGetHandleByPciBusId_v2(name.encode(), ctypes.byref(handle)) != 0:
                return False
        for capability in _NVML_P2P_CAPS:
            status = ctypes.c_int(-1)
            pair = (*handles, capability, ctypes.byref(status))
            if nvml.nvmlDeviceGetP2PStatus(*pair) != 0 or status.value != 0:
                return False
        return True
    finally:
        nvml.nvmlShutdown()
