"""A Mamba-2 mixer (arXiv 2405.21060) cut over ranks: two lines of it involve other ranks.

    torchrun --standalone --nproc_per_node 3 examples/mamba2_layer.py

compares three ranks with one, packed documents with each document alone, and, if transformers is
installed, one rank with its Mamba2Mixer: output, gradient of the input, gradients of all weights.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import lasp


class Mamba2Mixer(nn.Module):
    """The mixer of Mamba-2 over the tokens of a `lasp.SequenceShard`.

    Its parameters have the names and shapes of those in transformers' Mamba2Mixer. In low precision
    keep dt_bias and A_log in float32: the decay follows their dtype.
    """

    def __init__(self, dim, *, head_dim=64, state_size=128, num_groups=1, kernel_size=4, expand=2):
        super().__init__()
        inner, shared = expand * dim, num_groups * state_size
        self.num_heads, self.head_dim = (num_heads := inner // head_dim), head_dim
        self.num_groups, self.state_size = num_groups, state_size
        self.sizes = inner, shared, shared
        channels = sum(self.sizes)
        self.in_proj = nn.Linear(dim, inner + channels + num_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, kernel_size, groups=channels)
        self.A_log = nn.Parameter(torch.arange(1.0, num_heads + 1).log())
        # Steps from 0.001 to 0.1; softplus undoes the logarithm.
        self.dt_bias = nn.Parameter(torch.logspace(-3, -1, num_heads).expm1().log())
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, hidden, shard, cu_seqlens=None):
        """[B, T, dim] of this rank's tokens to the same; cu_seqlens: boundaries of packed documents
        in the global sequence."""
        inner, channels = self.sizes[0], sum(self.sizes)
        over_ranks = dict(
            cu_seqlens=cu_seqlens,
            group=shard.group,
            layout=shard.layout,
            shard_lengths=shard.lengths,
        )
        gate, xBC, dt = self.in_proj(hidden).split([inner, channels, self.num_heads], -1)
        xBC = F.silu(self.causal_conv(xBC, shard, over_ranks))
        x, B, C = xBC.split(self.sizes, -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        y = lasp.lightning_attention(
            self.of_every_head(C),
            self.of_every_head(B),
            (dt.unsqueeze(-1) * x).to(x.dtype),
            dt * -self.A_log.exp(),
            exchange=shard.exchange,
            **over_ranks,
        )
        y = (y + self.D.to(x.dtype).unsqueeze(-1) * x).flatten(-2)
        return self.out_proj(self.gated_norm(y, gate))

    def causal_conv(self, x, shard, over_ranks):
        """The depthwise convolution over the last kernel_size tokens of the same document."""
        kernel_size = self.conv1d.kernel_size[0]
        before = lasp.exchange_previous_tokens(x, kernel_size - 1, **over_ranks)
        # In zigzag a rank holds two chunks, each with its own previous tokens.
        num_chunks = len(shard.ranges)
        length = x.shape[1] // num_chunks
        before = before.unflatten(1, (num_chunks, kernel_size - 1))
        x = torch.cat([before, x.unflatten(1, (num_chunks, length))], dim=2)
        age = age_in_document(shard, over_ranks["cu_seqlens"], x.device)
        age = age.view(num_chunks, length, 1)
        y = self.conv1d.bias
        for tap, weight in enumerate(self.conv1d.weight.squeeze(1).unbind(1)):
            earlier = x[:, :, tap : tap + length]
            y = y + weight * earlier.where(age >= kernel_size - 1 - tap, 0)
        return y.flatten(1, 2)

    def of_every_head(self, shared):
        """[B, T, H, N] of what the heads of a group share: a view if there is one group."""
        shared = shared.unflatten(-1, (self.num_groups, 1, self.state_size))
        heads = self.num_heads // self.num_groups
        return shared.expand(-1, -1, -1, heads, -1).flatten(2, 3)

    def gated_norm(self, y, gate):
        """RMSNorm of y * silu(gate), in each group of heads."""
        size = y.shape[-1] // self.num_groups
        y = (y * F.silu(gate)).unflatten(-1, (self.num_groups, size))
        return F.rms_norm(y, (size,), eps=self.norm.eps).flatten(-2) * self.norm.weight


def age_in_document(shard, cu_seqlens, device):
    """How many tokens of its document precede each token of this rank."""
    positions = shard.positions(device)
    if cu_seqlens is None:
        return positions
    cu_seqlens = cu_seqlens.to(device, positions.dtype)
    return positions - cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]


def results(forward, mixer, hidden, group=None):
    """Output, gradient of the input, and gradients of all weights, summed over the ranks."""
    hidden = hidden.detach().requires_grad_()
    output = forward(hidden)
    weights = dict(mixer.named_parameters())
    # Any function of the output, with a different gradient for each of its values.
    grads = torch.autograd.grad(output.sin().sum(), [hidden, *weights.values()])
    if group is not None:
        for grad in grads[1:]:
            dist.all_reduce(grad, group=group)
    return dict(zip(("output", "input", *weights), (output.detach(), *grads), strict=True))


def describe_error(actual, truth):
    """The relative error of the output, of the input's gradient, and the worst of a weight's."""
    errors = {name: float((actual[name] - x).norm() / x.norm()) for name, x in truth.items()}
    output, of_input = errors.pop("output"), errors.pop("input")
    name = max(errors, key=errors.get)
    return (
        f"output {output:.1e}, gradient of the input {of_input:.1e}, "
        f"of the weights at most {errors[name]:.1e} ({name})"
    )


def from_transformers(mixer):
    """transformers' mixer with the same weights; None if transformers is not installed."""
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Theirs
    except ImportError:
        return None
    dim = mixer.in_proj.in_features
    config = Mamba2Config(
        hidden_size=dim,
        expand=mixer.sizes[0] // dim,
        num_heads=mixer.num_heads,
        head_dim=mixer.head_dim,
        state_size=mixer.state_size,
        n_groups=mixer.num_groups,
        conv_kernel=mixer.conv1d.kernel_size[0],
    )
    theirs = Theirs(config, layer_idx=0)
    theirs.load_state_dict(mixer.state_dict())
    return theirs


def main():
    dist.init_process_group("gloo")
    group, total = dist.group.WORLD, 1000
    torch.manual_seed(0)  # The same weights and sequence on every rank.
    mixer = Mamba2Mixer(96, head_dim=32, state_size=64)
    hidden = torch.randn(1, total, 96)
    documents = (0, 1, 340, 342, total)
    whole, shard = lasp.SequenceShard.whole, lasp.SequenceShard.split(total, group)

    def documents_alone(hidden):
        cuts = pairwise(documents)
        return torch.cat([mixer(hidden[:, a:b], whole(b - a)) for a, b in cuts], dim=1)

    alone = results(lambda hidden: mixer(hidden, whole(total)), mixer, hidden)
    for what, cu_seqlens, truth in (
        ("one rank", None, alone),
        ("documents alone", torch.tensor(documents), results(documents_alone, mixer, hidden)),
    ):
        cut = results(
            lambda hidden, cu_seqlens=cu_seqlens: mixer(hidden, shard, cu_seqlens),
            mixer,
            shard.take(hidden),
            group,
        )
        truth = truth | {name: shard.take(truth[name]) for name in ("output", "input")}
        error = describe_error(cut, truth)
        print(f"rank {shard.rank} of {shard.size}, against {what}: {error}", flush=True)
    theirs = from_transformers(mixer) if shard.rank == 0 else None
    if theirs is not None:
        error = describe_error(alone, results(theirs, theirs, hidden))
        print(f"one rank, against transformers: {error}")
    elif shard.rank == 0:
        print("transformers is not installed: nothing else to compare with")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
