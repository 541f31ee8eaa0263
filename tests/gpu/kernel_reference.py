"""What the kernels must compute, in plain torch: the truth in float64, the error bound in others.

Independent of the kernels: one document at a time, and in reverse the tokens are flipped.
"""

from __future__ import annotations

import torch


def plain_scan(a, b, x, state, *, log_decay, scale, reverse, dtype, block):
    """(y, last state) of one document; a, b [T, H, A], x [T, H, X], state [H, A, X].

    Products see and give `dtype`; states and decays are float32 (float64 if that is `dtype`). With
    `reverse` the tokens come last first, and the state is a gradient: it already holds `scale`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rate = log_decay.to(wide)[:, None, None]
    a, b, x = (operand.to(dtype).transpose(0, 1) for operand in (a, b, x))
    y = torch.zeros_like(x)
    state = state.to(wide)
    for start in range(0, a.shape[1], block):
        rows = slice(start, min(start + block, a.shape[1]))
        length = rows.stop - start
        position = torch.arange(length, device=a.device, dtype=wide)[:, None]
        decay = torch.exp(rate * (position - position.mT).clamp_min(0)).tril()
        inside = (decay * scale * (a[:, rows] @ b[:, rows].mT)).to(dtype) @ x[:, rows]
        if reverse:
            reach = torch.exp(rate * position)
            weight = scale * torch.exp(rate * (length - position))
        else:
            reach = scale * torch.exp(rate * (position + 1))
            weight = torch.exp(rate * (length - 1 - position))
        y[:, rows] = (inside + reach * (a[:, rows] @ state.to(dtype))).to(dtype)
        new = b[:, rows].mT @ (weight * x[:, rows]).to(dtype)
        state = torch.exp(rate * length) * state + new.to(wide)
    return y.transpose(0, 1), state


def plain_attention(
    q, k, v, do, S0, dS, *, log_decay, scale, cu_seqlens=None, dtype=torch.float64, block=64
):
    """{o, dq, dk, dv [B, T, H, .], final, dS0 [N, H, D, E]} for S0, dS [N, H, D, E]."""
    if cu_seqlens is None:
        documents = [(row, slice(None)) for row in range(q.shape[0])]
    else:
        pairs = zip(cu_seqlens, cu_seqlens[1:], strict=False)
        documents = [(0, slice(start, stop)) for start, stop in pairs]
    likes = dict(o=v, dq=q, dk=k, dv=v)
    out = {name: torch.empty_like(like, dtype=dtype) for name, like in likes.items()}
    states = {"final": [], "dS0": []}
    options = dict(log_decay=log_decay, scale=scale, dtype=dtype, block=block)
    for n, where in enumerate(documents):
        q_n, k_n, v_n, do_n = (operand[where] for operand in (q, k, v, do))
        out["o"][where], final = plain_scan(q_n, k_n, v_n, S0[n], reverse=False, **options)
        out["dq"][where], _ = plain_scan(do_n, v_n, k_n, S0[n].mT, reverse=False, **options)
        q_n, k_n, v_n, do_n = (operand.flip(0) for operand in (q_n, k_n, v_n, do_n))
        dk, _ = plain_scan(v_n, do_n, q_n, dS[n].mT, reverse=True, **options)
        dv, dS0 = plain_scan(k_n, q_n, do_n, dS[n], reverse=True, **options)
        out["dk"][where], out["dv"][where] = dk.flip(0), dv.flip(0)
        states["final"].append(final)
        states["dS0"].append(dS0)
    return out | {name: torch.stack(state) for name, state in states.items()}


def head_errors(actual, truth, head_dim):
    """||actual - truth|| / ||truth|| per head: one without decay would hide the others."""
    actual, truth = (x.double().movedim(head_dim, 0).flatten(1) for x in (actual, truth))
    return (actual - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)
