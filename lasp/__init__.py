"""Lightning attention and its sequence parallelism. Importing needs no GPU and no process group."""

from lasp import decay
from lasp.attention import lightning_attention, lightning_attention_step
from lasp.ops import reference
from lasp.ops.describe import describe_kernels
from lasp.previous_tokens import exchange_previous_tokens
from lasp.shard import SequenceShard
from lasp.softmax_attention import softmax_attention

__all__ = [
    "SequenceShard",
    "__version__",
    "decay",
    "describe_kernels",
    "exchange_previous_tokens",
    "lightning_attention",
    "lightning_attention_step",
    "reference",
    "softmax_attention",
]

# Single source of the version; pyproject.toml reads it.
__version__ = "0.2.0.dev0"
