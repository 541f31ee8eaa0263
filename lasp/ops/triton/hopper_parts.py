"""What the kernels written in Gluon do alike."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def begin_score(a, b, mma: gl.constexpr):
    """Begin the product a b^T of tiles in shared memory."""
    ROWS: gl.constexpr = a.shape[0]
    COLUMNS: gl.constexpr = b.shape[0]
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    return warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)
