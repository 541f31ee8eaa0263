"""Remembered launches: the right compiled variant, whatever the tensors' addresses and dtypes."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from lasp.ops import triton as kernels  # noqa: E402
from lasp.ops.triton import scan_chained, scan_hopper  # noqa: E402
from lasp.ops.triton.launch import Bound  # noqa: E402
from lasp.ops.triton.scan import scan_kernel  # noqa: E402
from tests.lasp.ops.hopper_compile import HOPPER  # noqa: E402

NUMBERS = (7, 0.5)
CONSTANTS = dict(D=64, REVERSE=True)


class FakeKernel(JITFunction):
    """Writes down launches; a "compiled variant" of its own for every plain one."""

    def __init__(self):
        self.pre_run_hooks = []
        self.plain, self.direct = [], []
        self.interpreted = False

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.plain.append((grid, args, constants))
            return None if self.interpreted else FakeVariant(self, len(self.plain))

        return launch


class FakeVariant:
    packed_metadata = "metadata"

    def __init__(self, kernel, number):
        self.kernel, self.function = kernel, number

    def run(self, *args):
        self.kernel.direct.append(args)


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    driver = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))


@pytest.fixture
def kernel():
    return FakeKernel()


def tensor_at(offset, size=64):
    """A bfloat16 tensor whose address is `offset` bytes past a multiple of 16."""
    whole = torch.zeros(size + 16, dtype=torch.bfloat16)
    first = (-whole.data_ptr() % 16 + offset) // 2
    x = whole[first : first + size]
    assert x.data_ptr() % 16 == offset
    return x


def test_the_second_launch_is_direct(kernel):
    bound = Bound(kernel, NUMBERS, CONSTANTS, num_warps=4)
    x, y = tensor_at(0), tensor_at(0)
    bound(3, x, None, leading=["described"])
    [(grid, args, named)] = kernel.plain
    assert grid == (3,) and args[0] == "described" and args[1] is x and args[2:] == (None, *NUMBERS)
    assert named == CONSTANTS | {"num_warps": 4}
    bound(5, y, None, leading=["another"])
    assert len(kernel.plain) == 1
    # No pointer for None, constants last, hooks left out.
    given = (*(None,) * 3, "another", y.data_ptr(), 0, *NUMBERS, *CONSTANTS.values())
    assert kernel.direct == [(5, 1, 1, "stream of -1", 1, "metadata", *given)]


def test_addresses_and_devices_have_their_own_variants(kernel, monkeypatch):
    bound = Bound(kernel, NUMBERS, CONSTANTS)
    places = [(0, 0), (2, 0), (0, 2), (8, 2)]
    for _ in range(2):
        for a, b in places:
            bound(1, tensor_at(a), tensor_at(b))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 1)
    for _ in range(2):
        bound(1, tensor_at(0), tensor_at(0))
    assert len(kernel.plain) == len(places) + 1
    # Each of the second round runs what its own first launch compiled.
    assert [args[4] for args in kernel.direct] == [1, 2, 3, 4, 5]
    assert kernel.direct[-1][3] == "stream of 1"


def test_hooks_see_every_launch(kernel):
    bound = Bound(kernel, NUMBERS, CONSTANTS)
    x = tensor_at(0)
    bound(1, x)
    hooks = (
        (triton.knobs.runtime.launch_enter_hook.calls, print),
        (triton.knobs.runtime.launch_exit_hook.calls, print),
        (kernel.pre_run_hooks, print),
    )
    for calls, hook in hooks:
        seen = len(kernel.plain)
        calls.append(hook)
        try:
            bound(1, x)
        finally:
            calls.remove(hook)
        assert len(kernel.plain) == seen + 1
    assert not kernel.direct
    bound(1, x)
    assert len(kernel.direct) == 1


def test_what_cannot_be_run_directly_is_launched_plainly(kernel):
    kernel.interpreted = True
    bound = Bound(kernel, NUMBERS, CONSTANTS)
    for _ in range(3):
        bound(1, tensor_at(0))
    assert len(kernel.plain) == 3 and not kernel.direct


def test_variants_depend_on_nothing_else():
    """What this Triton compiles a kernel for is what a `Bound` compares, and no more."""
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(scan_kernel.signature, scan_kernel.params, backend)
    names = scan_kernel.arg_names
    tensors = [name for name in names if name.startswith("p_")]
    assert names[: len(tensors)] == tensors, "a Bound takes the tensors first"
    rest = [2 * i for i in range(len(names) - len(tensors))]

    def variant(*first):
        others = [tensor_at(0)] * (len(tensors) - len(first))
        return bind(*first, *others, *rest)[1]

    aligned = variant(tensor_at(0))
    assert variant(tensor_at(0, size=2**20)) == aligned
    assert variant(torch.zeros(64, 64, dtype=torch.bfloat16).T) == aligned
    differing = [variant(tensor_at(2)), variant(None), variant(tensor_at(0).float())]
    assert all(other != aligned for other in differing)
    assert variant(tensor_at(2)) == variant(tensor_at(8)), "only multiples of 16 differ"


class FakeDescriptor:
    def __init__(self, base, *_):
        self.base = base


def hopper_scan(x, state):
    plan = scan_hopper.plans.make_single_plan(x, None)
    how = dict(scale=1.0, initial_state=state, segment_states=None, reverse=False)
    scan_hopper.launch((x, x, x), (x,), torch.zeros(x.shape[2]), plan, None, **how)


def chained_scan(x, state):
    how = dict(scale=1.0, initial_state=state)
    scan_chained.launch((x, x, x), (x,), torch.zeros(x.shape[2]), **how)
    scan_chained.launch((x, x, x, x), (x, x, x), torch.zeros(x.shape[2]), **how)


LAUNCHES = {
    "step": lambda x, state: kernels.step(x[:, 0], x[:, 0], x[:, 0], state),
    "scan": lambda x, state: kernels.scan(x, x, x, None, scale=1.0, initial_state=state),
    "states": lambda x, state: kernels.prefix_states(x, x, None, segment_length=32),
    "hopper": hopper_scan,
    "chained": chained_scan,
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_dtype_runs_what_another_was_compiled_for(name, monkeypatch):
    """A step in bfloat16 once ran the float32 kernel of its shapes: NaN, and writes beyond `o`."""
    seen = {}

    def note(bound, programs, *tensors, leading=()):
        given = (*(None if x is None else getattr(x, "base", None) for x in leading), *tensors)
        dtypes = tuple(None if x is None else x.dtype for x in given)
        seen.setdefault(bound, []).append(dtypes)

    monkeypatch.setattr(Bound, "__call__", note)
    # What `launch` needs of Gluon, which it imports on a GPU only.
    gluon = SimpleNamespace(
        kernel=None,
        descriptor=FakeDescriptor,
        tile=lambda dtype, columns: (),
    )
    monkeypatch.setattr(scan_hopper, "_gluon", lambda device: gluon)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    monkeypatch.setattr(scan_chained, "_kernel", lambda: None)
    monkeypatch.setattr(scan_chained, "_make_flags", lambda *_: torch.zeros(1))
    if name in ("hopper", "chained"):
        dtypes = dtypes[1:]
    try:
        for dtype in dtypes * 2:
            x = torch.zeros(2, 100, 3, 128, dtype=dtype)
            LAUNCHES[name](x, torch.zeros(2, 3, 128, 128))
    finally:
        for remembered in (scan_hopper._bind, scan_hopper._known_descriptor, scan_chained._bind):
            remembered.cache_clear()
    assert len(seen) >= len(dtypes)
    for launches in seen.values():
        assert len(launches) > 1, "the second round finds what the first one made"
        assert len(set(launches)) == 1, launches
