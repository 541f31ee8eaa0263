"""The example's gradients are those of the whole sequence, and it runs."""

import sys

import pytest
import torch
import torch.nn.functional as F

from examples import train_in_segments
from lasp.tnl import TNL, TNLConfig


@pytest.mark.parametrize("segment_len", [37, 200])
def test_gradients_are_those_of_the_whole_sequence(segment_len):
    torch.manual_seed(0)
    model = TNL(TNLConfig(vocab_size=50, dim=32, num_layers=2, num_heads=2, glu_dim=48)).double()
    text = torch.randint(50, (2, 201))
    tokens, labels = text[:, :-1], text[:, 1:]
    expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(expected, parameters)
    loss = train_in_segments.backward(model, tokens, labels, segment_len)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for p, gradient in zip(parameters, gradients, strict=True):
        # LRPE's rates are float32.
        bound = 1e-10 if p.dtype == torch.float64 else 1e-5
        assert (p.grad - gradient).norm() <= bound * gradient.norm()


def test_it_runs(monkeypatch, capsys):
    line = ["train_in_segments.py", "--tokens", "300", "--segment_len", "100", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", line)
    train_in_segments.main()
    assert capsys.readouterr().out.count("loss 5.") == 2
