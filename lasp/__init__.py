"""Lightning attention and its sequence parallelism. Importing needs no GPU and no process group."""

from lasp import decay
from lasp.attention import (
    attend,
    lightning_attention,
    lightning_attention_step,
    start_state,
)
from lasp.ops import reference
from lasp.shard import SequenceShard
from lasp.softmax import softmax_attention

__all__ = [
    "SequenceShard",
    "__version__",
    "attend",
    "decay",
    "lightning_attention",
    "lightning_attention_step",
    "reference",
    "softmax_attention",
    "start_state",
]

# The only place: pyproject.toml reads it from here.
__version__ = "0.2.0.dev0"
