"""Calls on CPU tensors that launch every variant of the kernels, to compile them without a GPU.

Nothing is run, so the tensors hold nothing. The Hopper scan is not among them: it runs on sm_90
only, and has tests of its own.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from lasp.ops import triton as kernels
from lasp.ops.triton import decode
from lasp.ops.triton.launch_config import MAX_DECODE_ROWS, SEND_CHUNK
from lasp.ops.triton.lrpe import lrpe, lrpe_backward

T, H = 1024, 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Key and value dim: one of each class of tiles, and one of odd sizes with odd strides.
DIMS = {"64": (64, 64), "128": (128, 128), "256": (256, 256), "odd": (33, 100)}
# Tokens per segment, from so many states that the largest tiles fill the GPU to too few.
SEGMENTS = (64, 192, 256, 512, 1024)


class Launch(NamedTuple):
    """A call that launches kernels; `dims` and `dtype` are keys of DIMS and DTYPES, "" for none.

    Attributes:
        segment: tokens per segment.
        max_fold: launch constant MAX_FOLD.
    """

    kernel: str
    dtype: str
    dims: str
    variant: str
    call: Callable[[], object]
    segment: int = 256
    max_fold: int = 0


def all_launches() -> list[Launch]:
    """Every dtype, class of head dims and kind of every kernel."""
    found = [*_send_launches(), *_cumulate_launches(), *_decode_launches()]
    for dtype, dims in itertools.product(DTYPES, DIMS):
        for launches in (
            _scan_launches,
            _dkdv_launches,
            _state_launches,
            _by_token_launches,
            _gradient_launches,
            _other_launches,
        ):
            found += launches(dtype, dims)
    return found


# (kernel, dtype, dims, variant) of those that need most.
_MOST = "reverse packed initial segment"
QUICK = {
    *(("scan", "bf16", dims, _MOST) for dims in DIMS),
    ("scan", "bf16", "128", "initial folded"),
    ("scan", "fp16", "128", _MOST),
    ("scan", "fp32", "128", _MOST),
    ("scan", "fp32", "256", "plain"),
    *(("scan", "bf16", dims, f"{_MOST} token dots") for dims in DIMS),
    ("scan", "fp16", "128", f"{_MOST} token dots"),
    ("scan", "fp32", "128", f"{_MOST} token dots"),
    *(("state", "bf16", dims, "reverse packed total token segment=64") for dims in DIMS),
    ("state", "bf16", "128", "reverse total token segment=512"),
    ("state", "fp32", "128", "packed total token segment=64"),
    ("cumulate", "", "", "odd"),
    ("gradient", "bf16", "128", "packed initial final"),
    *(("state", "bf16", dims, "reverse packed total segment=64") for dims in DIMS),
    ("state", "bf16", "128", "total segment=256"),
    ("state", "bf16", "128", "total segment=512"),
    ("state", "fp32", "128", "total segment=64"),
    ("step", "bf16", "256", ""),
    ("lrpe", "bf16", "256", "forward"),
    ("lrpe", "bf16", "256", "backward"),
    ("send_recv_state", "", "", "receives sends factor uneven"),
    ("linear", "bf16", "", "qkvu rows=1"),
    ("linear", "bf16", "", "gated rows=64"),
    ("linear", "bf16", "", "down rows=64"),
    ("mixer", "bf16", "128", "lrpe rows=64"),
    ("next_tokens", "", "", "rows=64"),
}


def quick_launches() -> list[Launch]:
    """One of each kind and class of head dims, those that need most."""
    return [launch for launch in all_launches() if launch[:4] in QUICK]


def _operands(dtype: str, dims: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.empty(1, T, H, dim, dtype=DTYPES[dtype]) for dim in DIMS[dims])


def _scan_launches(dtype: str, dims: str) -> Iterator[Launch]:
    D, E = DIMS[dims]
    k, v = _operands(dtype, dims)
    entering = {"none": None, "segment": torch.empty(3, H, D, E), "folded": torch.empty(3, H, D, E)}
    choices = itertools.product((False, True), (False, True), (False, True), entering)
    for reverse, packed, has_initial, segment in choices:
        if packed and segment == "folded":
            continue
        initial = torch.empty(1 + packed, H, D, E) if has_initial else None
        options = dict(
            scale=0.3,
            initial_state=initial,
            segment_states=entering[segment],
            cu_seqlens=(0, 300, T) if packed else None,
            reverse=reverse,
        )
        names = dict(reverse=reverse, packed=packed, initial=has_initial)
        names[segment] = segment != "none"
        yield Launch(
            "scan",
            dtype,
            dims,
            _variant(**names),
            partial(kernels.scan, k, k, v, None, **options),
            max_fold=15 if segment == "folded" else 0,
        )


def _dkdv_launches(dtype: str, dims: str) -> Iterator[Launch]:
    """Of heads so small that one launch computes dk and dv, on the chips that do."""
    if dims != "64" or dtype == "fp32":
        return
    (D, E), (k, v) = DIMS[dims], _operands(dtype, dims)
    sums = torch.empty(1, H, T + 1, dtype=torch.float64)
    entering = {"none": None, "segment": torch.empty(3, H, D, E), "folded": torch.empty(3, H, D, E)}
    flags = (False, True)
    choices = itertools.product(flags, flags, entering, flags, flags)
    for packed, has_initial, segment, token, dots in choices:
        if (segment == "folded" and (packed or token)) or (dots and not token):
            continue
        call = partial(
            kernels.scan_dkdv,
            *(k, k, v, v),
            sums if token else None,
            scale=0.3,
            initial_state=torch.empty(1 + packed, H, D, E) if has_initial else None,
            segment_states=entering[segment],
            cu_seqlens=(0, 300, T) if packed else None,
            with_dots=dots,
        )
        names = dict(packed=packed, initial=has_initial) | {segment: segment != "none"}
        names = _variant(**names, token=token, dots=dots)
        max_fold = 15 if segment == "folded" else 0
        yield Launch("dkdv", dtype, dims, names, call, max_fold=max_fold)


def _state_launches(dtype: str, dims: str) -> Iterator[Launch]:
    k, v = _operands(dtype, dims)
    flags = (False, True)
    # What is folded into the scan is not combined: a variant of the combine kernel.
    segments = [(segment, 0) for segment in SEGMENTS] + [(192, 15)]
    choices = itertools.product(flags, flags, flags, segments)
    for reverse, packed, with_total, (segment, max_fold) in choices:
        if segment == T and not with_total:
            continue  # Documents of one segment have no other state: nothing is launched.
        options = dict(
            cu_seqlens=(0, 300, T) if packed else None,
            reverse=reverse,
            scale=0.3,
            with_total=with_total,
        )
        names = _variant(reverse=reverse, packed=packed, total=with_total)
        yield Launch(
            "state",
            dtype,
            dims,
            f"{names} segment={segment}{' folded' if max_fold else ''}",
            partial(kernels.chunk_states, k, v, None, **options),
            segment,
            max_fold,
        )


def _by_token_launches(dtype: str, dims: str) -> Iterator[Launch]:
    """Scans with and without dots, and states, of a decay per token: never folded."""
    D, E = DIMS[dims]
    k, v = _operands(dtype, dims)
    decay = torch.empty(1, H, T + 1, dtype=torch.float64)
    states = torch.empty(3, H, D, E)
    flags = (False, True)
    for reverse, packed, initial, segment, dots in itertools.product(flags, repeat=5):
        options = dict(
            scale=0.3,
            initial_state=torch.empty(1 + packed, H, D, E) if initial else None,
            segment_states=states if segment else None,
            cu_seqlens=(0, 300, T) if packed else None,
            reverse=reverse,
            dot_with=v if dots else None,
        )
        names = dict(reverse=reverse, packed=packed, initial=initial, segment=segment)
        names = _variant(**names, token=True, dots=dots)
        yield Launch("scan", dtype, dims, names, partial(kernels.scan, k, k, v, decay, **options))
    for reverse, packed, total, segment in itertools.product(flags, flags, flags, SEGMENTS):
        if segment == T and not total:
            continue
        documents = (0, 300, T) if packed else None
        options = dict(cu_seqlens=documents, reverse=reverse, scale=0.3, with_total=total)
        names = _variant(reverse=reverse, packed=packed, total=total, token=True)
        call = partial(kernels.chunk_states, k, v, decay, **options)
        yield Launch("state", dtype, dims, f"{names} segment={segment}", call, segment)


def _gradient_launches(dtype: str, dims: str) -> Iterator[Launch]:
    """The gradient of a decay per token; the scans give dots in blocks of 64 columns or fewer."""
    D, E = DIMS[dims]
    decay = torch.empty(1, H, T + 1, dtype=torch.float64)
    states = torch.empty(3, H, D, E)
    narrow = 16 if dtype == "fp32" and D > 64 else 32 if dtype == "fp32" else 64
    dots = [torch.empty(1, H, -(-dim // narrow), T) for dim in (D, E)]
    for packed, initial, final in itertools.product((False, True), repeat=3):
        rows = torch.empty(1 + packed, H, D, E)
        call = partial(
            kernels.decay_gradient,
            *dots,
            decay,
            start=torch.empty(1 + packed, H) if initial else None,
            segment_states=(states, states),
            entering=((rows if initial else None, None), (rows if final else None, None)),
            cu_seqlens=(0, 300, T) if packed else None,
        )
        names = _variant(packed=packed, initial=initial, final=final)
        yield Launch("gradient", dtype, dims, names, call)


def _cumulate_launches() -> Iterator[Launch]:
    """The sums of a decay per token: of whole tiles, and of odd sizes and strides."""
    whole, odd = torch.empty(2, T, H), torch.empty(2, 33, 1001).mT
    yield Launch("cumulate", "", "", "plain", partial(kernels.prepare_decay, whole))
    yield Launch("cumulate", "", "", "odd", partial(kernels.prepare_decay, odd))


def _other_launches(dtype: str, dims: str) -> Iterator[Launch]:
    D, E = DIMS[dims]
    k, v = _operands(dtype, dims)
    state, theta = torch.empty(1, H, D, E), torch.empty(H, D)
    grad = torch.empty(1, T, H, 2 * D, dtype=k.dtype)
    step = partial(kernels.step, k[:, 0], k[:, 0], v[:, 0], state)
    yield Launch("step", dtype, dims, "", step)
    yield Launch("lrpe", dtype, dims, "forward", partial(lrpe, k, k, theta, 0))
    backward = partial(lrpe_backward, grad, grad, k, k, theta, 0)
    yield Launch("lrpe", dtype, dims, "backward", backward)


def _send_launches() -> Iterator[Launch]:
    flags = ((True, True, True), (True, True, False), (True, False, False), (False, True, False))
    for (receives, sends, has_factor), dim in itertools.product(flags, (128, 100)):
        local = torch.empty(1, H, dim, dim)
        own, previous, following = (
            (torch.empty(local.numel(), dtype=torch.int64), torch.empty(2000, dtype=torch.int32))
            for _ in range(3)
        )
        call = partial(
            kernels.send_recv_state,
            local,
            torch.empty(H) if has_factor else None,
            torch.empty_like(local) if receives else None,
            own,
            previous if receives else None,
            following if sends else None,
        )
        uneven = dim * dim % SEND_CHUNK != 0
        names = _variant(receives=receives, sends=sends, factor=has_factor, uneven=uneven)
        yield Launch("send_recv_state", "", "", names, call)


def _variant(**flags: bool) -> str:
    return " ".join(name for name, given in flags.items() if given) or "plain"


def _decode_launches() -> Iterator[Launch]:
    """The token step of TNL-1b."""
    width, inner, vocabulary = 2048, 5632, 64000
    counters = torch.empty(4096, dtype=torch.int32)

    def weight(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16)

    for rows in (1, 16, 32, MAX_DECODE_ROWS):
        x, wide, squares = weight(rows, width), weight(rows, inner), torch.empty(rows, 64)
        linear = partial(decode.linear, x, counters=counters, squares=squares)
        gate, residual = weight(inner, width), dict(residual=x, with_squares=True)
        head = dict(weight=weight(vocabulary, width), dtype=torch.float32)
        calls = {
            "qkvu": partial(linear, weight=weight(4 * width, width), silu=128),
            "out": partial(linear, weight=weight(width, width), **residual),
            "gated": partial(linear, weight=gate, gate=gate),
            "down": partial(decode.linear, wide, weight(width, inner), counters, **residual),
            "head": partial(linear, **head),
        }
        for name, call in calls.items():
            yield Launch("linear", "bf16", "", f"{name} rows={rows}", call)
        qkvu, positions = weight(rows, 16, 4, 128), torch.empty(rows, dtype=torch.int64)
        for has_lrpe, by_token in itertools.product((False, True), repeat=2):
            state = torch.empty(rows, 16, 256 if has_lrpe else 128, 128)
            turns = torch.empty(16, 128, dtype=torch.float64) if has_lrpe else None
            decay = torch.empty(*([rows] if by_token else []), 16)
            call = partial(decode.mixer, qkvu, state, decay, turns, positions)
            names = _variant(lrpe=has_lrpe, by_token=by_token)
            yield Launch("mixer", "bf16", "128", f"{names} rows={rows}".strip(), call)
        tokens = positions
        yield Launch("embed", "bf16", "", f"rows={rows}", partial(decode.embed, tokens, x[:1], 1.0))
        logits = torch.empty(rows, vocabulary)
        call = partial(decode.next_tokens, logits, tokens, positions)
        yield Launch("next_tokens", "", "", f"rows={rows}", call)
