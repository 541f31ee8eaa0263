"""Lets megatron-core run on gloo: its calls that need a GPU are redirected to the CPU.

For test processes only, installed before Megatron builds anything.
"""

import contextlib
import importlib.util

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode


class _Stream:
    """A CUDA stream or event: nothing to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *others):
        pass

    def record_event(self, *others):
        return _Stream()

    wait_event = wait = record = synchronize = wait_stream


def _to_cpu(x, as_numpy=False, record_stream=False):
    return x.numpy() if as_numpy and torch.is_tensor(x) else x


def _te_checkpoint(function, distribute, get_rng_states, group, *args):
    """Transformer Engine's: reentrant, without Megatron's flag."""
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)


def _is_cuda(value):
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


class _CudaToCpu(TorchFunctionMode):
    """device="cuda" means the CPU; type() returns the names of CUDA tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def install():
    """Patch this process permanently."""
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.core.transformer.multi_latent_attention as latent
    import megatron.core.transformer.transformer_block as transformer_block

    # It converts tensors from GPUs only, and all_to_all takes no tensors of sizes.
    token_dispatcher.maybe_move_tensor_to_cpu = _to_cpu
    # What Megatron lacks without Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    latent.HAVE_TE = isinstance(latent.TELinear, type)
    # Taken with FP8, here without it. Since 0.17 in a module of its own.
    has_module = importlib.util.find_spec("megatron.core.recompute") is not None
    recompute = "megatron.core.recompute" if has_module else transformer_block.__name__
    importlib.import_module(recompute).te_checkpoint = _te_checkpoint

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: _Stream()
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    _CudaToCpu().__enter__()
