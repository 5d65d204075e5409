"""What is generated from a table is what the table says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.reference.bias_act import _FUNCTIONS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("script", ["generate_activations.py", "generate_matrix.py"])
def test_generated_files_are_current(script):
    command = [sys.executable, str(ROOT / "tools" / script), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


VOCABULARY = {
    "where": lambda c, a, b: torch.where(c, torch.as_tensor(a, dtype=torch.float64), b),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_table_agrees_with_torch(act):
    """The expressions, evaluated as they stand, against PyTorch's functions and their autograd."""
    row = ACTIVATIONS[act]
    v = torch.linspace(-30, 30, 241, dtype=torch.float64).requires_grad_()  # 0 and 20 among them
    names = {**VOCABULARY, "v": v.detach(), "alpha": 0.3}
    y = _FUNCTIONS[act](v, 0.3)
    torch.testing.assert_close(eval(row.value, names), y.detach(), rtol=1e-12, atol=1e-14)
    (g,) = torch.autograd.grad(y.sum(), v, create_graph=True)
    if not row.curved:
        expected = torch.where(v > 0, 1.0, row.negative_slope(0.3))
        torch.testing.assert_close(expected.double(), g.detach())
        return
    torch.testing.assert_close(eval(row.slope, names), g.detach(), rtol=1e-9, atol=1e-12)
    (gg,) = torch.autograd.grad(g.sum(), v)
    torch.testing.assert_close(eval(row.curvature, names), gg, rtol=1e-8, atol=1e-12)
