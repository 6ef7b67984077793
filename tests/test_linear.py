"""The oneDNN product is the product: against float64, forward and backward, whatever the layout of its inputs."""

import pytest
import torch

from dualhead.networks import linear
from dualhead.networks.linear import Linear

needs_onednn = pytest.mark.skipif(not linear._HAS_ONEDNN, reason="this build of PyTorch has no oneDNN product")


@needs_onednn
@pytest.mark.parametrize("shape", [(300, 64, 100), (64, 1000, 17), (1025, 33, 64)])
def test_product_and_gradients_equal_float64(shape, monkeypatch):
    batch, given, wanted = shape
    used = []
    real = linear._onednn_product
    monkeypatch.setattr(linear, "_onednn_product", lambda *args: used.append(1) or real(*args))
    torch.manual_seed(0)
    layer = Linear(given, wanted)
    x = torch.randn(given, batch).t().requires_grad_()
    weights = torch.randn(batch, wanted)
    got = [layer(x), *torch.autograd.grad((layer(x) * weights).sum(), [x, layer.weight, layer.bias])]
    assert len(used) == 4  # two products forward, two for the gradients
    layer, x = layer.double(), x.detach().double().requires_grad_()
    exact = [layer(x), *torch.autograd.grad((layer(x) * weights).sum(), [x, layer.weight, layer.bias])]
    for ours, expected in zip(got, exact):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_no_gradient_is_made_for_what_needs_none():
    layer = Linear(64, 256)
    x = torch.randn(512, 64)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None


@pytest.mark.parametrize(("batch", "dtype"), [(2, torch.float32), (512, torch.float64), (0, torch.float32)])
def test_small_and_double_products_go_the_usual_way(batch, dtype, monkeypatch):
    monkeypatch.setattr(linear._OneDNNLinear, "apply", None)
    layer = Linear(64, 256).to(dtype)
    x = torch.randn(batch, 64, dtype=dtype)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
