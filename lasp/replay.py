"""Repeats what a call did on the host: its allocations, its launches, and how streams wait.

A call of the operator decides much and does little: it allocates a few tensors and launches a few
kernels. All that it decides follows from the specs of its tensors and from its options. So a call
with these is recorded, and later ones repeat the recording with their own tensors:

    call = Call(name, tensors, options)
    if call.recording is not None:
        results = call.replay()
    else:
        with call.record():
            results = ...                   # allocates by torch.empty
        call.finish(results)

What runs inside tells the recorder what it does beside that: `note_launch`, `note_call`,
`note_check`, `note_constants`. A call that runs any other operator of torch, or says `refuse`, is
not recorded, and runs in full every time.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "Call",
    "forget",
    "note_call",
    "note_check",
    "note_constants",
    "note_launch",
    "on_device_of",
    "refuse",
    "spec",
    "unseen",
]

_EMPTY = torch.ops.aten.empty.memory_format
_NO_CONTEXT = nullcontext()
# The first calls of a kind may make what all later ones find.
_ATTEMPTS = 3
# Lengths that differ in every step must not fill the memory.
_MAX_RECORDINGS = 512
# By group, None for calls without one. A number in place of a recording: of attempts that failed.
_of_device: dict[Hashable, Recording | int] = {}
_of_groups: WeakKeyDictionary[ProcessGroup, dict[Hashable, Recording | int]] = WeakKeyDictionary()


def _allocator(device: str) -> Callable:
    """Allocates memory of (shape, strides, dtype) on the current device of this type.

    What compiled code allocates with takes a third of the time of torch.empty.
    """
    made = getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)
    return made or (lambda *spec: torch.empty_strided(*spec[:2], dtype=spec[2], device=device))


empty_strided = {device: _allocator(device) for device in ("cpu", "cuda")}


class Step(NamedTuple):
    """One step of a call.

    Attributes:
        function: function(programs, stream, addresses) launches; or function(*tensors) is called;
            None waits for the check of the call.
        programs: of a launch; 0: a call.
        slots: of the tensors.
        stream: of a launch; None: the caller's.
    """

    function: Callable | None
    programs: int
    slots: tuple[int, ...]
    stream: int | None


class Recording(NamedTuple):
    """What a call does. A slot counts the call's tensors, then what it allocates, then constants.

    Attributes:
        allocations: (shape, strides, dtype) of each.
        constants, constant_addresses: further tensors, None with address 0 as the last.
        steps: in their order.
        results: the slot of each result, None for None.
        check: what all ranks have to agree on, or None.
    """

    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    constants: tuple[torch.Tensor | None, ...]
    constant_addresses: tuple[int, ...]
    steps: tuple[Step, ...]
    results: tuple[int | None, ...]
    check: dict | None


class Call:
    """A call of the operator on the tensors' device, the first one's.

    Args:
        name, options: tell calls apart that do different things with tensors of the same specs.
        tensors: all that it reads, None where it reads none.
        stream: the handle of the current stream.
        group: over whose ranks the call runs.
    """

    def __init__(
        self,
        name: str,
        tensors: tuple[torch.Tensor | None, ...],
        options: Hashable,
        *,
        stream: int,
        group: ProcessGroup | None = None,
    ) -> None:
        self._tensors, self._stream = tensors, stream
        self._addresses = [0 if x is None else x.data_ptr() for x in tensors]
        # Other variants of the kernels serve odd addresses.
        self._is_aligned = not functools.reduce(operator.or_, self._addresses) % 16
        self._key = (name, options, *[None if x is None else _kind(x) for x in tensors])
        self._kept: MutableMapping[Hashable, Recording | int] = _of_device
        if group is not None:
            # The stream: what is remembered on the device was computed on it.
            self._key = (stream, *self._key)
            self._kept = _of_groups.setdefault(group, {})
        found = self._kept.get(self._key) if self._is_aligned else None
        self.recording = found if isinstance(found, Recording) else None
        self._attempts = found if isinstance(found, int) else 0
        self._recorder: _Recorder | None = None

    def replay(self, wait: Callable[[], None] | None = None) -> list[torch.Tensor | None]:
        """The results, computed as recorded; `wait` waits for the check of the call."""
        recording, tensors, addresses = self.recording, list(self._tensors), self._addresses
        empty = empty_strided[tensors[0].device.type]
        with on_device_of(tensors[0]):
            for shape, strides, dtype in recording.allocations:
                made = empty(shape, strides, dtype)
                tensors.append(made)
                addresses.append(made.data_ptr())
            tensors += recording.constants
            addresses += recording.constant_addresses
            for function, programs, slots, stream in recording.steps:
                if programs:
                    stream = self._stream if stream is None else stream
                    function(programs, stream, [addresses[slot] for slot in slots])
                elif function is not None:
                    function(*[tensors[slot] for slot in slots])
                else:
                    wait()
        return [None if slot is None else tensors[slot] for slot in recording.results]

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record what runs inside, if it can be repeated."""
        present = [x.data_ptr() for x in self._tensors if x is not None]
        # Tensors of equal addresses, or of no address, could not be told apart.
        distinct = 0 not in present and len(set(present)) == len(present)
        if not self._is_aligned or not distinct or self._attempts >= _ATTEMPTS:
            yield
            return
        self._recorder = _Recorder(self._stream)
        _active.recorder, before = self._recorder, _active.recorder
        try:
            with self._recorder:
                yield
        finally:
            _active.recorder = before

    def finish(self, results: tuple[torch.Tensor | None, ...]) -> None:
        """Keep what was recorded; `results` are those of the call."""
        if self._recorder is None:
            return
        recording = self._recorder.recording(self._tensors, results)
        if len(self._kept) >= _MAX_RECORDINGS:
            self._kept.clear()
        self._kept[self._key] = self._attempts + 1 if recording is None else recording


def note_launch(
    direct: Callable[[int], Callable | None],
    programs: int,
    stream: int | None,
    tensors: tuple[torch.Tensor | None, ...],
) -> None:
    """Note a launch.

    Args:
        direct: direct(device) is Step.function of the launch, None if it must not be repeated.
        programs: number of programs, at least 1.
        stream: the handle of the current stream.
        tensors: of the launch.
    """
    if (recorder := _active.recorder) is not None:
        recorder.notes.append((direct, programs, tensors, stream))


def note_call(function: Callable, *tensors: torch.Tensor | None) -> None:
    """Call function(*tensors), now and in every replay; it may run any operator.

    It must not keep a process group alive. The memory that it writes is allocated before it.
    """
    if (recorder := _active.recorder) is None:
        function(*tensors)
        return
    recorder.notes.append((function, 0, tensors, None))
    with _disable_current_modes():
        function(*tensors)


def note_check(check: dict) -> None:
    """The call has waited until all ranks were known to agree on `check`."""
    if (recorder := _active.recorder) is not None:
        recorder.notes.append((None, 0, (), None))
        recorder.check = check


def note_constants(*tensors: torch.Tensor) -> None:
    """Tensors that launches read or write, and that are the same in every call of a kind."""
    if (recorder := _active.recorder) is not None:
        recorder.constants += tensors


def unseen() -> AbstractContextManager:
    """What runs inside is not recorded: a replay does it by itself."""
    return _NO_CONTEXT if _active.recorder is None else _disable_current_modes()


def refuse() -> None:
    """What runs now cannot be repeated."""
    if (recorder := _active.recorder) is not None:
        recorder.is_complete = False


def forget(group: ProcessGroup | None = None) -> None:
    """Drop the recordings of a group; None: all."""
    if group is not None:
        _of_groups.pop(group, None)
        return
    _of_device.clear()
    _of_groups.clear()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the tensor's device the current one, on which Triton launches."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(tensor.device)


def spec(tensor: torch.Tensor | None) -> tuple | None:
    """(shape, strides, dtype): all that a launch depends on besides the address; None for None."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


class _Active(threading.local):
    recorder: _Recorder | None = None


_active = _Active()


class _Recorder(TorchDispatchMode):
    """Notes allocations and steps, and whether anything else happens."""

    def __init__(self, stream: int) -> None:
        super().__init__()
        self._stream = stream
        self._allocated: list[torch.Tensor] = []
        self.notes: list[tuple[Any, int, tuple, int | None]] = []
        self.constants: list[torch.Tensor] = []
        self.check: dict | None = None
        self.is_complete = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is _EMPTY:
            self._allocated.append(made)
        elif not func.is_view:
            self.is_complete = False
        return made

    def recording(self, tensors: tuple, results: tuple) -> Recording | None:
        """The recording of a call with these tensors and results; None if it cannot be repeated."""
        known = [*tensors, *self._allocated, *self.constants, None]
        slots = {0 if x is None else x.data_ptr(): i for i, x in enumerate(known)}
        device = tensors[0].device
        if not self.is_complete or any(x.device != device for x in self._allocated):
            return None
        steps = []
        for function, programs, of_step, stream in self.notes:
            addresses = [0 if x is None else x.data_ptr() for x in of_step]
            if any(each not in slots for each in addresses):
                return None
            indices = tuple(slots[each] for each in addresses)
            if programs:
                function = function(tensors[0].get_device())
                # It serves aligned addresses only.
                if function is None or any(each % 16 for each in addresses):
                    return None
            elif any(spec(known[i]) != spec(x) for i, x in zip(indices, of_step, strict=True)):
                return None  # Of a view; a replay would pass the whole tensor.
            stream = None if stream == self._stream else stream
            steps.append(Step(function, programs, indices, stream))
        found = tuple(None if x is None else slots.get(x.data_ptr(), -1) for x in results)
        pairs = [pair for pair in zip(results, found, strict=True) if pair[0] is not None]
        if any(slot < 0 or spec(known[slot]) != spec(x) for x, slot in pairs):
            return None
        allocations = tuple((tuple(x.shape), x.stride(), x.dtype) for x in self._allocated)
        addresses = (*(x.data_ptr() for x in self.constants), 0)
        constants = (*self.constants, None), addresses
        return Recording(allocations, *constants, tuple(steps), found, self.check)


def _kind(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
