"""Cached launches run the right compiled variant, whatever the tensors' addresses and dtypes."""

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from lasp.ops import triton as kernels  # noqa: E402
from lasp.ops.triton import launcher  # noqa: E402
from lasp.ops.triton.launcher import CachedLaunch  # noqa: E402
from lasp.ops.triton.scan import scan_kernel  # noqa: E402
from tests.lasp.ops.triton.compiler import HOPPER  # noqa: E402
from tests.lasp.ops.triton.launch_constants import launch_constants  # noqa: E402

NUMBERS = (7, 0.5)
CONSTANTS = dict(D=64, REVERSE=True)


class FakeKernel(JITFunction):
    """Records launches; every plain one gets a "compiled variant" of its own, a number."""

    def __init__(self):
        self.pre_run_hooks = []
        # Of every plain launch the grid and its arguments; of every direct one its variant and
        # what it was called with.
        self.plain, self.direct = [], []
        self.plain_only = None

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.plain.append((grid, args, constants))
            return self, len(self.plain)

        return launch


class FakeDirectLaunch:
    def __init__(self, compiled, tensors, descriptors, numbers):
        self.kernel, self.variant = compiled
        if self.kernel.plain_only is not None:
            raise self.kernel.plain_only
        self.prepared = tuple(tensors), tuple(descriptors), tuple(numbers)

    def __call__(self, programs, stream, addresses):
        self.kernel.direct.append((self.variant, self.prepared, (programs, stream, addresses)))


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(launcher, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(launcher, "DirectLaunch", FakeDirectLaunch)


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
    describe = [lambda x: ("described", x.data_ptr()), None]
    launch = CachedLaunch(kernel, NUMBERS, CONSTANTS, descriptors=describe, num_warps=4)
    x, y, z = tensor_at(0), tensor_at(0), tensor_at(0)
    launch(3, x, None, y, None)
    [(grid, args, named)] = kernel.plain
    described = ("described", x.data_ptr()), None
    assert grid == (3,) and args[:2] == described
    assert args[2] is y and args[3:] == (None, *NUMBERS)
    assert named == CONSTANTS | {"num_warps": 4, "enable_fp_fusion": True}
    launch(5, z, None, x, None)
    assert len(kernel.plain) == 1
    [(variant, (tensors, descriptors, numbers), given)] = kernel.direct
    assert variant == 1 and descriptors == described and numbers == NUMBERS
    assert tensors[0] is x and tensors[2] is y and tensors[1] is tensors[3] is None
    # Later calls pass addresses only, 0 for None.
    assert given == (5, "stream of -1", [z.data_ptr(), 0, x.data_ptr(), 0])


def test_addresses_and_devices_have_their_own_variants(kernel, monkeypatch):
    launch = CachedLaunch(kernel, NUMBERS, CONSTANTS)
    places = [(0, 0), (2, 0), (0, 2), (8, 2)]
    for _ in range(2):
        for a, b in places:
            launch(1, tensor_at(a), tensor_at(b))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 1)
    for _ in range(2):
        launch(1, tensor_at(0), tensor_at(0))
    assert len(kernel.plain) == len(places) + 1
    # Each of the second round runs what its own first launch compiled.
    assert [variant for variant, *_ in kernel.direct] == [1, 2, 3, 4, 5]
    assert kernel.direct[-1][2][1] == "stream of 1"


def test_hooks_see_every_launch(kernel):
    launch = CachedLaunch(kernel, NUMBERS, CONSTANTS)
    x = tensor_at(0)
    launch(1, x)
    hooks = (
        (triton.knobs.runtime.launch_enter_hook.calls, print),
        (triton.knobs.runtime.launch_exit_hook.calls, print),
        (kernel.pre_run_hooks, print),
    )
    for calls, hook in hooks:
        seen = len(kernel.plain)
        calls.append(hook)
        try:
            launch(1, x)
        finally:
            calls.remove(hook)
        assert len(kernel.plain) == seen + 1
    assert not kernel.direct
    launch(1, x)
    assert len(kernel.direct) == 1


@pytest.mark.parametrize(
    "reason", [LookupError("clusters"), AttributeError("no metadata")], ids=str
)
def test_a_kernel_that_cannot_run_directly_is_launched_plainly(kernel, reason):
    kernel.plain_only = reason
    launch = CachedLaunch(kernel, NUMBERS, CONSTANTS)
    for _ in range(3):
        launch(1, tensor_at(0))
    assert len(kernel.plain) == 3 and not kernel.direct


def test_variants_depend_on_nothing_else():
    """This Triton compiles a variant for what a `CachedLaunch` compares, and for nothing else."""
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(scan_kernel.signature, scan_kernel.params, backend)
    names = scan_kernel.arg_names
    tensors = [name for name in names if name.startswith("p_")]
    assert names[: len(tensors)] == tensors, "a CachedLaunch takes the tensors first"
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


def scan(x, state):
    kernels.scan(x, x, x, None, scale=1.0, initial_state=state)


def hopper_scan(x, state):
    with launch_constants(LARGE_VALUES=0, has_gluon=lambda device: True):
        scan(x, state)


LAUNCHES = {
    "step": lambda x, state: kernels.step(x[:, 0], x[:, 0], x[:, 0], state),
    "scan": scan,
    "states": lambda x, state: kernels.chunk_states(x, x, None),
    "hopper": hopper_scan,
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_dtype_runs_what_another_was_compiled_for(name, monkeypatch):
    """A step in bfloat16 once ran the float32 kernel of its shapes: NaN, and writes beyond `o`."""
    seen = {}

    def note(launch, programs, *tensors):
        dtypes = tuple(None if x is None else x.dtype for x in tensors)
        seen.setdefault(launch, []).append(dtypes)

    monkeypatch.setattr(CachedLaunch, "__call__", note)
    dtypes = [torch.float32, torch.bfloat16, torch.float16][name == "hopper" :]
    for dtype in dtypes * 2:
        x = torch.zeros(2, 300, 3, 128, dtype=dtype)
        LAUNCHES[name](x, torch.zeros(2, 3, 128, 128))
    assert len(seen) >= len(dtypes)
    for launches in seen.values():
        assert len(launches) > 1, "the second round finds what the first one made"
        assert len(set(launches)) == 1, launches
