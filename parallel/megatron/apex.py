"""NVIDIA's apex, if it is installed and requested.

Detected by its compiled extensions: PyPI's package named apex is another program and has none.
"""

from __future__ import annotations

import importlib

__all__ = ["EXTENSIONS", "has_apex", "require_apex"]

# Feature -> the compiled extension it needs.
EXTENSIONS = {
    "FusedRMSNorm": "fused_layer_norm_cuda",
    "gradient accumulation fusion": "fused_weight_gradient_mlp_cuda",
}


def has_apex(feature: str) -> bool:
    """True if a feature of `EXTENSIONS` can be used here."""
    try:
        importlib.import_module(EXTENSIONS[feature])
    except ImportError:
        return False
    return True


def require_apex(feature: str) -> None:
    """Raise ValueError, with installation instructions, if a feature is missing."""
    if not has_apex(feature):
        raise ValueError(
            f"apex's {feature} is requested, but its extension {EXTENSIONS[feature]} cannot be "
            "imported. Build NVIDIA's apex: git clone https://github.com/NVIDIA/apex && cd apex && "
            "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (the package "
            "named apex on PyPI is another program). Or do not request it: torch's is used then."
        )
