"""Repeats what a call did on the host: its allocations and its launches.

A call of the operator decides much and does little: it allocates a few tensors and launches a few
kernels. All that it decides follows from the specs of its tensors and from its options. So the
first call with these is recorded, and later ones repeat the recording with their own tensors:

    call = Call(name, tensors, options)
    if call.recording is not None:
        results = call.replay()
    else:
        with call.record():
            results = ...               # allocates by torch.empty, launches by `CachedLaunch`
        call.finish(results)

A call that runs any other operator of torch, or a kernel that the driver cannot launch directly, is
not recorded, and runs in full every time.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lasp.ops.triton import launcher
from lasp.ops.triton.driver import DirectLaunch
from lasp.ops.triton.launcher import on_device_of, spec

_EMPTY = torch.ops.aten.empty.memory_format
# Lengths that differ in every step must not fill the memory.
_MAX_RECORDINGS = 512
# None: a call that cannot be repeated.
_recordings: dict[Hashable, Recording | None] = {}


class Recording(NamedTuple):
    """What a call does. A slot counts the call's tensors, then what it allocates.

    Attributes:
        allocations: (shape, dtype) of each, or the slot of a tensor with the same contiguous spec.
        constants: addresses of further slots; the last is 0.
        launches: (kernel, number of programs, the slots of its tensors).
        results: the slot of each result, None for None.
    """

    allocations: tuple[tuple[torch.Size, torch.dtype] | int, ...]
    constants: tuple[int, ...]
    launches: tuple[tuple[DirectLaunch, int, tuple[int, ...]], ...]
    results: tuple[int | None, ...]


class Call:
    """A call of the operator on the tensors' device, the first one's.

    Args:
        name, options: tell calls apart that do different things with tensors of the same specs.
        tensors: all that it reads, None where it reads none.
    """

    def __init__(
        self, name: str, tensors: tuple[torch.Tensor | None, ...], options: Hashable
    ) -> None:
        self._tensors = tensors
        self._key = name, options, tensors[0].device, *map(spec, tensors)
        self._addresses = [0 if x is None else x.data_ptr() for x in tensors]
        # Other variants of the kernels serve odd addresses.
        aligned = not functools.reduce(operator.or_, self._addresses) % 16
        usual = aligned and not launcher.has_hooks()
        self.recording = _recordings.get(self._key) if usual else None
        self._recorder: _Recorder | None = None
        self._is_recordable = usual and self._key not in _recordings and self._are_distinct()

    def _are_distinct(self) -> bool:
        """False for tensors of equal addresses, or of no address, which could not be told apart."""
        present = [x.data_ptr() for x in self._tensors if x is not None]
        return 0 not in present and len(set(present)) == len(present)

    def replay(self) -> list[torch.Tensor | None]:
        """The results, computed as recorded."""
        recording, tensors, addresses = self.recording, list(self._tensors), self._addresses
        device = tensors[0].device
        with on_device_of(tensors[0]):
            for each in recording.allocations:
                if isinstance(each, int):
                    made = torch.empty_like(tensors[each])
                else:
                    made = torch.empty(each[0], dtype=each[1], device=device)
                tensors.append(made)
                addresses.append(made.data_ptr())
            addresses += recording.constants
            stream = launcher.current_stream(tensors[0].get_device())
            for launch, programs, slots in recording.launches:
                launch(programs, stream, [addresses[slot] for slot in slots])
        return [None if slot is None else tensors[slot] for slot in recording.results]

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record what runs inside, if it can be repeated."""
        if not self._is_recordable:
            yield
            return
        self._recorder = _Recorder()
        with self._recorder, launcher.observed_by(self._recorder.note_launch):
            yield

    def finish(self, results: tuple[torch.Tensor | None, ...]) -> None:
        """Keep what was recorded; `results` are those of the call."""
        if self._recorder is None:
            return
        if len(_recordings) >= _MAX_RECORDINGS:
            _recordings.clear()
        _recordings[self._key] = self._recorder.recording(self._tensors, results)


def forget() -> None:
    """Drop all recordings."""
    _recordings.clear()


class _Recorder(TorchDispatchMode):
    """Notes allocations and launches, and whether anything else happens."""

    def __init__(self) -> None:
        super().__init__()
        self._allocated: list[torch.Tensor] = []
        self._launches: list[tuple[Any, int, tuple]] = []
        self._is_complete = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is _EMPTY:
            self._allocated.append(made)
        elif not func.is_view:
            self._is_complete = False
        return made

    def note_launch(self, launch: Any, programs: int, tensors: tuple) -> None:
        self._launches.append((launch, programs, tensors))

    def recording(self, tensors: tuple, results: tuple) -> Recording | None:
        """The recording of a call with these tensors and results; None if it cannot be repeated."""
        known = [*tensors, *self._allocated, *launcher.constants()]
        slots = {x.data_ptr(): i for i, x in enumerate(known) if x is not None}
        device = tensors[0].device
        if not self._is_complete or any(x.device != device for x in self._allocated):
            return None
        slots[0] = len(known)
        constants = (*(x.data_ptr() for x in launcher.constants()), 0)
        launches = []
        for launch, programs, of_launch in self._launches:
            addresses = [0 if x is None else x.data_ptr() for x in of_launch]
            direct = launch.direct(tensors[0].get_device())
            if direct is None or any(address not in slots for address in addresses):
                return None
            launches.append((direct, programs, tuple(slots[address] for address in addresses)))
        allocations = [self._allocation(x, tensors) for x in self._allocated]
        indices = [None if x is None else slots.get(x.data_ptr(), -1) for x in results]
        made = {slot: x for x, slot in zip(results, indices, strict=True) if x is not None}
        if any(slot < 0 or spec(known[slot]) != spec(x) for slot, x in made.items()):
            return None
        return Recording(tuple(allocations), constants, tuple(launches), tuple(indices))

    @staticmethod
    def _allocation(made, tensors):
        for slot, x in enumerate(tensors):
            if (
                x is not None
                and x.is_contiguous()
                and (x.shape, x.dtype) == (made.shape, made.dtype)
            ):
                return slot
        return made.shape, made.dtype
