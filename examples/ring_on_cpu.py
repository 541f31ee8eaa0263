"""One sequence over two processes of a laptop: the result is that of one process.

torchrun --standalone --nproc_per_node 2 examples/ring_on_cpu.py
"""

import torch
import torch.distributed as dist

import lasp

dist.init_process_group("gloo")
rank = dist.get_rank()

# The same random sequence on every rank; each keeps its own contiguous shard.
torch.manual_seed(0)
B, T, H, D = 1, 4097, 8, 64
q, k, v = (torch.randn(B, T, H, D) / D**0.5 for _ in range(3))
log_decay = lasp.decay.tnl(num_heads=H, layer=0, num_layers=12)
shard = lasp.SequenceShard.split(T, dist.group.WORLD)
local_q, local_k, local_v = (shard.take(x).requires_grad_() for x in (q, k, v))

# The only line that involves other ranks: it sends an H x D x D state to the next one.
o = lasp.lightning_attention(local_q, local_k, local_v, log_decay, group=dist.group.WORLD)
o.square().sum().backward()

expected = shard.take(lasp.lightning_attention(q, k, v, log_decay))
error = (o - expected).norm() / expected.norm()
print(f"rank {rank}: tokens {shard.start} to {shard.stop} of {T}, relative error {error:.1e}")
dist.destroy_process_group()
