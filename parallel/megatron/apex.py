"""NVIDIA's apex, where it is installed and asked for.

Found by its compiled extensions: a package that is merely named apex (PyPI's is another program)
has none.
"""

from __future__ import annotations

import importlib

__all__ = ["EXTENSIONS", "has_apex", "require_apex"]

# What it gives -> the compiled module that does it.
EXTENSIONS = {
    "FusedRMSNorm": "fused_layer_norm_cuda",
    "gradient accumulation fusion": "fused_weight_gradient_mlp_cuda",
}


def has_apex(feature: str) -> bool:
    """Whether a feature of `EXTENSIONS` can be used here."""
    try:
        importlib.import_module(EXTENSIONS[feature])
    except ImportError:
        return False
    return True


def require_apex(feature: str) -> None:
    """Raise ValueError, with the way to install it, where a feature is missing."""
    if not has_apex(feature):
        raise ValueError(
            f"apex's {feature} is asked for, but its extension {EXTENSIONS[feature]} cannot be "
            "imported. Build NVIDIA's apex: git clone https://github.com/NVIDIA/apex && cd apex && "
            "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (the package "
            "named apex on PyPI is another program). Or do not ask for it: torch's is used then."
        )
