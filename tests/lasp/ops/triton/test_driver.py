"""A launch by `driver` gives the CUDA driver what Triton's own launch of the kernel would give it.

Neither needs a GPU here: a process of its own has a driver library that only writes down what it is
called with (fake_libcuda.c), and kernels are compiled for sm_90 as far as PTX.
"""

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime.jit import JITFunction  # noqa: E402

from lasp.ops import triton as kernels  # noqa: E402
from lasp.ops.triton import launcher  # noqa: E402
from lasp.ops.triton.driver import DirectLaunch  # noqa: E402
from lasp.ops.triton.hopper import available  # noqa: E402
from lasp.ops.triton.launcher import CachedLaunch  # noqa: E402
from tests.lasp.ops.triton.compiler import compile_launch  # noqa: E402
from tests.lasp.ops.triton.launch_constants import launch_constants  # noqa: E402

STREAM, FUNCTION = 0x5000, 0x7000


class Launch(ctypes.Structure):
    """What fake_libcuda.c writes down."""

    _fields_ = [
        ("grid", 3 * ctypes.c_uint32),
        ("block", 3 * ctypes.c_uint32),
        *((name, ctypes.c_uint32) for name in ("shared", "attributes", "num_params", "padding")),
        *((name, ctypes.c_uint64) for name in ("function", "stream")),
        ("values", 128 * (128 * ctypes.c_ubyte)),
    ]


class FakeGPU:
    """Compiles kernels, and launches them by Triton's own code, with the fake driver library."""

    def __init__(self, library):
        self.library = library
        # Of every plain launch the kernel's name and arguments, and what it gave the driver.
        self.plain = []

    def getitem(self, kernel, grid):
        def launch(*arguments, **constants):
            compiled = compile_launch(kernel, arguments, constants)
            sizes = ptx_sizes(compiled)
            self.library.set_sizes((ctypes.c_uint64 * len(sizes))(*sizes), len(sizes))
            run = triton.backends.nvidia.driver.CudaLauncher(compiled.src, compiled.metadata)
            metadata = compiled.metadata
            packed = metadata.num_warps, metadata.num_ctas, metadata.shared
            every = *arguments, *(constants[name] for name in kernel.arg_names if name in constants)
            assert len(every) == len(kernel.arg_names)
            run(grid[0], 1, 1, STREAM, FUNCTION, packed, None, None, None, *every)
            self.plain.append((kernel, arguments, compiled, sizes, self.last_launch()))
            return SimpleNamespace(
                function=FUNCTION, metadata=metadata, src=compiled.src, name=compiled.name
            )

        return launch

    def last_launch(self):
        return Launch.from_buffer_copy(Launch.in_dll(self.library, "last_launch"))


def ptx_sizes(compiled):
    """Bytes of each parameter of the kernel."""
    _, entry = compiled.asm["ptx"].split(".entry", 1)
    sizes = []
    for parameter in entry.split("(", 1)[1].split(")", 1)[0].split(","):
        bits = re.search(r"\.[bsuf](\d+) ", parameter)[1]
        count = re.search(r"\[(\d+)\]", parameter)
        sizes.append(int(bits) // 8 * int(count[1] if count else 1))
    return sizes


def check(launch, gpu):
    """Every kernel of this call, launched directly, gets what it got from Triton's launch."""
    gpu.plain.clear()
    seen, ordinary = [], CachedLaunch.__call__

    def twice(cached, programs, *tensors):
        count = len(gpu.plain)
        ordinary(cached, programs, *tensors)
        assert len(gpu.plain) == count + 1
        assert None not in cached._variants.values(), "this kernel is never launched directly"
        for _ in range(2):
            ordinary(cached, programs, *tensors)
            compare(gpu.plain[-1], gpu.last_launch(), programs)
        assert len(gpu.plain) == count + 1
        seen.append(gpu.plain[-1][0].__name__)

    CachedLaunch.__call__ = twice
    try:
        launch()
    finally:
        CachedLaunch.__call__ = ordinary
    return seen


def compare(plain, direct, programs):
    kernel, arguments, compiled, sizes, wanted = plain
    for name in ("grid", "block"):
        assert list(getattr(direct, name)) == list(getattr(wanted, name)), name
    for name in ("shared", "function", "stream", "num_params", "attributes"):
        assert getattr(direct, name) == getattr(wanted, name), name
    assert wanted.grid[0] == programs and wanted.function == FUNCTION and not wanted.attributes
    assert wanted.block[0] == 32 * compiled.metadata.num_warps
    values, wanted_values = (
        [bytes(each.values[i][:size]) for i, size in enumerate(sizes)] for each in (direct, wanted)
    )
    assert values == wanted_values, kernel.__name__
    # The fake library wrote down values at all: the addresses of the tensors are among them.
    for argument in arguments:
        tensor = getattr(argument, "base", argument)
        if isinstance(tensor, torch.Tensor):
            address = tensor.data_ptr().to_bytes(8, "little")
            assert any(address in value for value in values), kernel.__name__


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)


def scan(H=3, D=64, packed=False, reverse=False, initial=True, dtype=torch.bfloat16):
    x = zeros(1 if packed else 2, 300, H, D, dtype=dtype)
    state = zeros(2, H, D, D, dtype=torch.float32) if initial else None
    with launch_constants(segment_length=128):
        offsets = dict(cu_seqlens=(0, 170, 300) if packed else None, reverse=reverse)
        states, _ = kernels.chunk_states(x, x, None, scale=0.25, **offsets)
        kernels.scan(
            x, x, x, None, scale=0.25, initial_state=state, segment_states=states, **offsets
        )


def step():
    x = zeros(2, 3, 80)
    kernels.step(x, x, zeros(2, 3, 96), zeros(2, 3, 80, 96, dtype=torch.float32), scale=0.3)


def send_recv_state():
    state = zeros(1, 2, 64, 100, dtype=torch.float32)
    sides = [(zeros(12800, dtype=torch.int64), zeros(16, dtype=torch.int32)) for _ in range(3)]
    factor = zeros(2, dtype=torch.float32)
    kernels.send_recv_state(state, factor, torch.empty_like(state), *sides)
    kernels.send_recv_state(state, None, None, sides[0], None, sides[1])


def hopper_scan(pair, packed=False, D=128, dtype=torch.bfloat16, states=True):
    T, H = 1024, 4
    # Slices of one tensor have strides other than their shapes say.
    a, x = zeros(1, T, H, D + 128, dtype=dtype).split([D, 128], dim=-1)
    options = dict(cu_seqlens=(0, 300, T) if packed else None, scale=0.25)
    if states:
        options["initial_state"] = zeros(1 + packed, H, D, 128, dtype=torch.float32)
        options["segment_states"] = zeros(1, H, D, 128, dtype=torch.float32)
    length = 512 if states else T
    constants = dict(segment_length=length, LARGE_VALUES=0, has_gluon=lambda device: True)
    with launch_constants(**constants):
        if pair:
            kernels.scan_dkdv(a, a, x, x, None, **options)
        else:
            kernels.scan(a, a, x, None, reverse=packed, **options)


def long_strides():
    """Numbers of 64 bits; nothing runs, so no memory has to be there."""
    x = zeros(1, 64, 2, 64)
    [(_, cached)] = launches_of(lambda: kernels.scan(x, x, x, None, scale=1.0))
    numbers = (2**40, *cached._numbers[1:])
    launch = CachedLaunch(cached._kernel, numbers, cached._named)
    tensors = (x, x, x, x, None, None, zeros(2, dtype=torch.float32), None, None, None)
    launch(2, *tensors)


def launches_of(call):
    """(programs, launch) of a call, none of which runs."""
    found, ordinary = [], CachedLaunch.__call__
    CachedLaunch.__call__ = lambda cached, programs, *_: found.append((programs, cached))
    try:
        call()
    finally:
        CachedLaunch.__call__ = ordinary
    return found


SCAN = ["state_kernel", "combine_kernel", "scan_kernel"]
HOPPER = ["hopper_scan_kernel"]
CASES = {
    "scan": (scan, SCAN),
    "packed scan in reverse": (lambda: scan(packed=True, reverse=True, H=1), SCAN),
    "scan of float32": (lambda: scan(initial=False, D=40, dtype=torch.float32), SCAN),
    "numbers of 64 bits": (long_strides, ["scan_kernel"]),
    "step": (step, ["step_kernel"]),
    "send_recv_state": (send_recv_state, 2 * ["send_recv_state_kernel"]),
    "Hopper scan": (lambda: hopper_scan(False), HOPPER),
    "Hopper scan, packed, float16, wide": (
        lambda: hopper_scan(False, packed=True, D=256, dtype=torch.float16),
        HOPPER,
    ),
    "Hopper scan without states": (lambda: hopper_scan(False, D=80, states=False), HOPPER),
    "Hopper scan of two results": (lambda: hopper_scan(True), HOPPER),
    "Hopper scan of two results, packed": (lambda: hopper_scan(True, packed=True), HOPPER),
}
needs_c_compiler = pytest.mark.skipif(
    not shutil.which("gcc"), reason="the fake driver library needs gcc, this machine has none"
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The traceback of each case that failed, None for each that did not."""
    folder = tmp_path_factory.mktemp("libcuda")
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("fake_libcuda.c")
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, source, "-o", library], check=True)
    # Nothing of this may stay in the user's cache: Triton's launcher was linked with this library.
    own = dict(TRITON_LIBCUDA_PATH=str(folder), TRITON_CACHE_DIR=str(folder / "cache"))
    process = subprocess.run(
        [sys.executable, "-m", __name__, library],
        cwd=Path(__file__).parents[4],
        env=os.environ | own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@needs_c_compiler
@pytest.mark.parametrize("case", CASES)
def test_direct_launches_equal_those_of_triton(case, errors):
    if case.startswith("Hopper") and not triton.__version__.startswith(available.COMPILED_VERSIONS):
        pytest.skip("the kernel is not used with this Triton")
    assert errors[case] is None, errors[case]


def prepared_launch(*codes, replaced=0):
    """A launch of one tensor map, which the driver answers with these codes."""
    launch = DirectLaunch.__new__(DirectLaunch)
    launch._driver = mock.Mock(cuTensorMapReplaceAddress=lambda pointer, address: replaced)
    launch._launch = mock.Mock(side_effect=codes)
    launch._compiled, launch._lock = SimpleNamespace(name="scan"), threading.Lock()
    launch._addresses, launch._buffer = struct.Struct("1Q"), ctypes.create_string_buffer(8)
    launch._maps = [[0, ctypes.c_void_p(64), None]]
    return launch


def test_an_address_that_the_driver_refuses_is_not_launched_with():
    launch = prepared_launch(0, 0, replaced=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="scan could not be launched"):
            launch(1, 0, [8])
    assert not launch._launch.called


def test_a_new_thread_gets_the_context_of_its_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    prepared_launch(0)(1, 0, [16])
    assert not chosen
    prepared_launch(201, 0)(1, 0, [16])
    assert chosen == [3]
    launch = prepared_launch(201, 201, 0)
    with pytest.raises(RuntimeError, match="scan could not be launched: .*201"):
        launch(1, 0, [16])
    launch(1, 0, [16])  # The lock is free.


def main(library):
    # By its name, every later search for the CUDA driver finds this library.
    gpu = FakeGPU(ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL))
    from triton.backends.nvidia import compiler as backend
    from triton.backends.nvidia import driver as nvidia

    # Of the driver's functions, Triton calls a few only.
    sys.setdlopenflags(os.RTLD_LAZY)
    backend.CUDABackend.make_cubin = lambda *args, **options: b""
    triton.runtime.driver.set_active(SimpleNamespace(utils=nvidia.CudaUtils()))
    JITFunction.__getitem__ = lambda kernel, grid: gpu.getitem(kernel, grid)
    launcher.current_stream = lambda device: STREAM
    found = dict.fromkeys(CASES)
    for case, (launch, names) in CASES.items():
        try:
            seen = check(launch, gpu)
            assert seen == names, seen
        except Exception:
            found[case] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
