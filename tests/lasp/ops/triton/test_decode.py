"""The kernels of a token step in Triton's interpreter, against float64."""

import dataclasses

import pytest
import torch

from lasp.ops.triton import decode
from lasp.ops.triton.launch_config import MAX_DECODE_PROGRAMS
from lasp.ops.triton.lrpe import turns
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.decoding import Decoder
from tests.lasp.cases import relative_error
from tests.lasp.ops.triton import interpreter


def counters():
    return torch.zeros(MAX_DECODE_PROGRAMS, dtype=torch.int32)


def check_linear(M, K, N, dtype=torch.float32, **kinds):
    x, weight, gate, residual = (
        torch.randn(shape).to(dtype) for shape in ((M, K), (N, K), (N, K), (M, N))
    )
    zeros = counters()
    squares = x.float().square().unflatten(1, (-1, 8)).sum(-1)
    options = dict(
        gate=gate if "gate" in kinds else None,
        squares=squares if "norm" in kinds else None,
        residual=residual if "residual" in kinds else None,
        silu=kinds.get("silu", 0),
    )
    y, sums = decode.linear(x, weight, zeros, eps=1e-6, with_squares=True, **options)
    exact = x.double()
    if "norm" in kinds:
        exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = exact @ weight.double().T
    if "silu" in kinds:
        q, k, v, u = expected.unflatten(1, (-1, 4, kinds["silu"])).unbind(2)
        silu = torch.nn.functional.silu
        expected = torch.stack((silu(q), silu(k), v, u), 2).flatten(1)
    if "gate" in kinds:
        expected = expected * (exact @ gate.double().T)
    if "residual" in kinds:
        expected = expected + residual.double()
    assert y.dtype == dtype and sums.dtype == torch.float32
    assert relative_error(y, expected) < (5e-7 if dtype == torch.float32 else 5e-4)
    assert relative_error(sums.sum(1), y.double().square().sum(1)) < 1e-6
    assert not zeros.any()


def check_mixer(D, has_lrpe, by_token, M=3, H=2):
    K = 2 * D if has_lrpe else D
    qkvu, state, theta = torch.randn(M, H, 4, D), torch.randn(M, H, K, D), torch.rand(H, D)
    log_decay = -torch.rand(*([M] if by_token else []), H)
    positions = torch.tensor([0, 5, 2**21 + 3])[:M]
    expected = state.double()
    rates = turns(theta) if has_lrpe else None
    y, sums = decode.mixer(qkvu, state, log_decay, rates, positions)
    q, k, v, u = qkvu.double().unbind(2)
    if has_lrpe:
        angle = positions[:, None, None] * theta.double()
        q, k = (torch.cat((x * angle.cos(), x * angle.sin()), -1) for x in (q, k))
    decay = log_decay.double().exp().expand(M, H)[..., None, None]
    expected = decay * expected + k[..., None] * v[..., None, :]
    o = (q[..., None, :] @ expected).squeeze(-2)
    assert relative_error(state, expected) < 3e-7
    assert relative_error(y, (u * o).flatten(1)) < 1e-6
    assert relative_error(sums.sum(1), o.square().sum((1, 2))) < 1e-6


def check_next_tokens():
    logits = torch.randn(5, 20_000)
    logits[0, 7] = logits[0, 12_000] = 9
    logits[1, 200] = torch.nan
    logits[2] = 1
    logits[3] = -torch.inf
    tokens, positions = torch.full((5,), -1), torch.arange(5)
    decode.next_tokens(logits, tokens, positions)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert positions.tolist() == [1, 2, 3, 4, 5]


def check_token_steps(rows, **changes):
    """Some steps of a model, all in the kernels, against its layers in float64."""
    torch.manual_seed(0)
    config = TNLConfig(vocab_size=100, dim=48, num_layers=2, num_heads=2, glu_dim=72, init_std=0.2)
    config = dataclasses.replace(config, **changes)
    model = TNL(config)
    fused = Decoder(model, rows, context=8)
    fused.use_kernels()
    exact = Decoder(TNL(config).double(), rows, context=8)
    exact.model.load_state_dict(model.state_dict())
    for _ in range(3):
        for decoder in (fused, exact):
            decoder.step()
        assert relative_error(fused.logits, exact.logits) < 1e-5
        assert torch.equal(fused.tokens, exact.tokens)
        assert torch.equal(fused.positions, exact.positions)
        for state, expected in zip(fused.states, exact.states, strict=True):
            assert relative_error(state, expected) < 1e-5


CASES = {
    "one row, norm and silu": lambda: check_linear(1, 96, 128, norm=1, silu=16),
    "one row, gate": lambda: check_linear(1, 352, 200, norm=1, gate=1),
    "one row, long inputs": lambda: check_linear(1, 2568, 36, residual=1),
    "3 rows, split, float16": lambda: check_linear(3, 1384, 40, torch.float16, residual=1),
    "16 rows, gate": lambda: check_linear(16, 96, 104, norm=1, gate=1),
    "20 rows, norm, residual": lambda: check_linear(20, 96, 96, norm=1, residual=1),
    "64 rows, silu": lambda: check_linear(64, 96, 192, norm=1, silu=24),
    "70 rows, two blocks": lambda: check_linear(70, 200, 72, residual=1),
    "mixer": lambda: check_mixer(16, False, False),
    "mixer, odd size, decay per token": lambda: check_mixer(24, False, True),
    "mixer, LRPE": lambda: check_mixer(24, True, False),
    "mixer, many sequences": lambda: check_mixer(16, False, False, M=2, H=70),
    "most likely tokens": check_next_tokens,
    "token steps, one sequence": lambda: check_token_steps(1),
    "token steps, 5 sequences": lambda: check_token_steps(5),
    "token steps, learned decay, no silu": lambda: check_token_steps(
        2, decay="learned", activation="none", scale_embedding=False
    ),
    "token steps, hybrid": lambda: check_token_steps(2, layer_types="LS", num_key_value_heads=1),
}


@pytest.mark.timeout(interpreter.TIMEOUT + 100)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_equation(case):
    error = interpreter.errors(__name__)[case]
    assert error is None, error


if __name__ == "__main__":
    interpreter.report(CASES)
