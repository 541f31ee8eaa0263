"""Which kernels serve calls on this machine, in words."""

from __future__ import annotations

import itertools

import torch

_HEAD_DIMS = range(8, 257, 8)
# Of a large call; see `launch_config.ScanShape.is_large`.
_SEQ_LEN, _NUM_HEADS = 131072, 16
_JOINT = "dk and dv in one launch"


def describe_kernels(device: torch.device | str | int | None = None) -> str:
    """Say which kernels serve `lasp.lightning_attention`, and why a faster one cannot run.

        print(lasp.describe_kernels())

    Args:
        device: a GPU or the CPU; the current GPU if None, or the CPU if there is none.

    Returns:
        A few lines: the versions of torch and Triton, the device, and the kernels for the head
        dimensions and dtypes of large and of small calls.

    Raises:
        ValueError: the device is a GPU and torch sees none.
    """
    device = _resolve(device)
    lines = [f"torch {torch.__version__}, {_triton_version()}"]
    if device.type != "cuda":
        return "\n".join([*lines, f"{device}: plain torch, in chunks, for all calls"])
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    lines.append(f"{device}: {name}, compute capability {'.'.join(map(str, capability))}")
    return "\n".join([*lines, *_describe_gpu(device)])


def _resolve(device):
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device is {device}; allowed are the CPU and CUDA GPUs: pass one of them."
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device is {device}, but torch sees no GPU. Pass 'cpu', or install a build of "
                "torch for the GPU's driver."
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "no triton"
    return f"triton {triton.__version__}"


def _describe_gpu(device: torch.device) -> list[str]:
    try:
        from lasp.ops.triton import launch_config
        from lasp.ops.triton.hopper.available import why_not
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return ["No kernel runs on the GPU without triton: pip install triton."]

    def kernels(head_dim: int, dtype: torch.dtype) -> str:
        shape = launch_config.ScanShape(1, _SEQ_LEN, _NUM_HEADS, head_dim, head_dim, packed=False)
        one, two = (launch_config.choose_scan(shape, dtype, device, n) for n in (1, 2))
        return f"{one.kernel.capitalize()} scan{', ' + _JOINT if two.num_results == 2 else ''}"

    least = launch_config.large_values(launch_config.chip_of(device))
    lines = [f"calls of {least:,} values of q or v and more:"]
    for names, dtype in (
        ("bfloat16, float16", torch.bfloat16),
        ("float32", torch.float32),
    ):
        for kernel, group in itertools.groupby(_HEAD_DIMS, lambda d: kernels(d, dtype)):  # noqa: B023
            lines.append(f"  {names}, head dims to {max(group)}: {kernel}")
    shape = launch_config.ScanShape(1, 1, 1, 64, 64, packed=False)
    two = launch_config.choose_scan(shape, torch.bfloat16, device, 2, copyable=False)
    small = f" (16 bits, head dims to 64: {_JOINT})" if two.num_results == 2 else ""
    lines.append(f"all smaller calls, and tensors that TMA cannot address: Triton scan{small}")
    reason = why_not(device)
    if reason is not None:
        lines.append(f"The Hopper scan cannot run here: {reason}.")
    return lines
