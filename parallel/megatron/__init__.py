"""Lightning attention and TNL as parts of a megatron-core model: change the spec, keep the rest.

Needs megatron-core (`pip install -e '.[megatron]'`). Process groups, sharded linear layers, DDP,
optimizer, checkpoints and pipeline schedules remain Megatron's own.
"""

try:
    import megatron.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "parallel.megatron needs megatron-core >= 0.16.1: pip install 'lasp[megatron]' "
        "(or pip install megatron-core psutil)."
    ) from error

from parallel.megatron.attention import LaspCoreAttention, LaspSoftmaxAttention
from parallel.megatron.context_parallel import BatchSplitter, split_batch
from parallel.megatron.convert import from_megatron, to_megatron
from parallel.megatron.layout import segments
from parallel.megatron.lightning_hybrid import (
    get_lightning_hybrid_block_spec,
    get_lightning_hybrid_layer_spec,
    get_lightning_hybrid_mtp_spec,
)
from parallel.megatron.loss import fuse_cross_entropy, vocab_parallel_cross_entropy
from parallel.megatron.norm import HeadsNorm, MegatronRMSNorm, MegatronSRMSNorm
from parallel.megatron.residual import LightningHybridLayer
from parallel.megatron.rotary import ShardedRotaryEmbedding
from parallel.megatron.self_attention import (
    LaspMLASelfAttention,
    LaspSelfAttention,
    LightningSelfAttention,
)
from parallel.megatron.specs import (
    get_lasp_gpt_layer_spec,
    get_tnl_block_spec,
    get_tnl_layer_spec,
    tnl_layer_spec,
    tnl_transformer_config,
)
from parallel.megatron.tnl import TNLSelfAttention, TNLTransformerLayer

__all__ = [
    "BatchSplitter",
    "HeadsNorm",
    "LaspCoreAttention",
    "LaspMLASelfAttention",
    "LaspSelfAttention",
    "LaspSoftmaxAttention",
    "LightningHybridLayer",
    "LightningSelfAttention",
    "MegatronRMSNorm",
    "MegatronSRMSNorm",
    "ShardedRotaryEmbedding",
    "TNLSelfAttention",
    "TNLTransformerLayer",
    "from_megatron",
    "fuse_cross_entropy",
    "get_lasp_gpt_layer_spec",
    "get_lightning_hybrid_block_spec",
    "get_lightning_hybrid_layer_spec",
    "get_lightning_hybrid_mtp_spec",
    "get_tnl_block_spec",
    "get_tnl_layer_spec",
    "segments",
    "split_batch",
    "tnl_layer_spec",
    "tnl_transformer_config",
    "to_megatron",
    "vocab_parallel_cross_entropy",
]
