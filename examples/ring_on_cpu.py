"""One sequence over two processes of a laptop: the ring gives what one process gives.

torchrun --standalone --nproc_per_node 2 examples/ring_on_cpu.py
"""

import torch
import torch.distributed as dist

import lasp

dist.init_process_group("gloo")
rank = dist.get_rank()

# The same random sequence everywhere; each rank keeps its own contiguous part of it.
torch.manual_seed(0)
B, T, H, D = 1, 4097, 8, 64
q, k, v = (torch.randn(B, T, H, D) / D**0.5 for _ in range(3))
log_decay = lasp.decay.tnl(num_heads=H, layer=0, num_layers=12)
shard = lasp.SequenceShard.split(T, dist.group.WORLD)
q_here, k_here, v_here = (x[:, shard.token_slice].requires_grad_() for x in (q, k, v))

# Only this line knows of other ranks: one H x D x D state goes to the next one, point to point.
o = lasp.lightning_attention(q_here, k_here, v_here, log_decay, group=dist.group.WORLD)
o.square().sum().backward()

o_alone = lasp.lightning_attention(q, k, v, log_decay)[:, shard.token_slice]
error = (o - o_alone).norm() / o_alone.norm()
print(f"rank {rank}: tokens {shard.start} to {shard.stop} of {T}, relative error {error:.1e}")
dist.destroy_process_group()
