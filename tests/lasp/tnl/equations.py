"""Equations that several tests compare with."""

import torch


def rope(x, position, base):
    """RoPE by its definition: one complex number per pair of channels."""
    D = x.shape[-1]
    rates = base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = position.double()[:, None, None] * rates
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], dim=-1)
