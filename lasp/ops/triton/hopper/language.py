"""Names of Gluon that Triton changed between 3.6 and 3.9, as all supported versions have them.

Gluon is experimental and renames things in every version. Only this module knows that.
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma


def _first_of(owner, *names):
    """What `owner` has under the first of these names that it has, newest first."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise AttributeError(f"{owner.__name__} has none of {', '.join(names)}")


# Synchronizes the warps of a role, or all warps before they take roles.
barrier = _first_of(gl, "barrier", "thread_barrier")
# Of a tile in shared memory: reinterpret(tile, dtype, shape, layout).
reinterpret = _first_of(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")
# 3.8 has both names, 3.9 keeps the older ones only to raise.
async_load = _first_of(tma, "async_load", "async_copy_global_to_shared")
async_store = _first_of(tma, "async_store", "async_copy_shared_to_global")
