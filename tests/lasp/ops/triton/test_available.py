"""Where the Hopper scan runs, what is said where it does not, and what describes it."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton

import lasp
from lasp.ops.triton import chip, launch_config
from lasp.ops.triton.hopper import available
from tests.lasp.ops.triton import compiler

GPU = torch.device("cuda", 0)
LARGE = launch_config.ScanShape(1, 131072, 16, 128, 128, packed=False)


def forget():
    for cached in (available.has_gluon, available.why_not, available._warn, chip.chip_of):
        cached.cache_clear()
    launch_config.choose_scan.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to have a Hopper GPU; gpu(capability) pretends another."""

    def pretend(*capability):
        forget()
        monkeypatch.setattr(triton, "__version__", "3.7.1")
        major, minor = capability
        found = SimpleNamespace(major=major, minor=minor, multi_processor_count=132, name="a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    pretend(9, 0)
    yield pretend
    forget()


def choose():
    return launch_config.choose_scan(LARGE, torch.bfloat16, GPU, 1).kernel


@compiler.needs_compiled_triton
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0"])
def test_a_tested_triton_gets_the_hopper_scan_without_a_word(gpu, monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == "hopper"
    text = lasp.describe_kernels()
    assert f"triton {triton.__version__}" in text and "cuda:0: a GPU" in text
    assert "bfloat16, float16, head dims to 128: Hopper scan, dk and dv in one launch" in text
    assert "bfloat16, float16, head dims to 256: Hopper scan" in text
    assert "float32, head dims to 256: Triton scan" in text
    assert "cannot run" not in text


def test_an_untested_triton_is_named_once(gpu, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    with pytest.warns(UserWarning) as caught:
        assert choose() == "triton"
        available.has_gluon(torch.device("cuda", 1))
    (warning,) = caught
    assert "triton is 3.99.0, and it was tested on GPUs with 3.6, 3.7, 3.9" in str(warning.message)
    assert "\n" not in str(warning.message)
    text = lasp.describe_kernels()
    assert text.splitlines()[-1].startswith("The Hopper scan cannot run here: triton is 3.99.0")
    assert "Hopper scan," not in text


@compiler.needs_compiled_triton
def test_a_name_that_is_missing_is_named(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "lasp.ops.triton.hopper.kernel", None)
    monkeypatch.delattr("lasp.ops.triton.hopper.kernel", raising=False)
    with pytest.warns(UserWarning, match="cannot import it.*hopper.kernel"):
        assert choose() == "triton"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_are_served_without_a_warning(gpu, capability):
    gpu(*capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == "triton"
    assert "compute capability 9.0" in lasp.describe_kernels("cuda:0").splitlines()[-1]


def test_the_cpu_needs_no_gpu():
    lines = lasp.describe_kernels("cpu").splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}") and lines[1].startswith("cpu: ")


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        lasp.describe_kernels(0)
    with pytest.raises(ValueError, match="device is meta"):
        lasp.describe_kernels("meta")
