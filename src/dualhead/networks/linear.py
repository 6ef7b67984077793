"""`nn.Linear` whose large fp32 products on a CPU go through oneDNN, in the forward and in the backward pass.

PyTorch sends them to its BLAS, which on some processors is MKL at half the machine's rate (docs/performance.md). The
arithmetic is fp32 either way and differs only in the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MIN_PRODUCTS = 1_000_000
"""Below so many products the call costs more than oneDNN saves."""


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, F] times weight [M, F] transposed, plus bias [M]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _onednn_works() -> bool:
    """Whether this build of PyTorch has the product, and computes it correctly."""
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        return torch.backends.mkldnn.is_available() and torch.equal(
            _onednn_product(x, weight, bias), x @ weight.t() + bias
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


_HAS_ONEDNN = _onednn_works()


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        # The product copies its first factor where that is a transposed view: let it be the narrower one.
        grad_x = _onednn_product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            wide = grad.shape[1] > x.shape[1]
            grad_weight = _onednn_product(x.t(), grad.t(), None).t() if wide else _onednn_product(grad.t(), x.t(), None)
        return grad_x, grad_weight, grad.sum(0)


class Linear(nn.Linear):
    """`nn.Linear` with a bias, for inputs [N, F]: equal up to rounding, faster on some processors."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            _HAS_ONEDNN
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.shape[0] * self.weight.numel() > MIN_PRODUCTS
            and not torch.is_autocast_enabled("cpu")
            and not torch.onnx.is_in_onnx_export()
        ):
            product: Tensor = _OneDNNLinear.apply(x, self.weight, self.bias)
            return product
        return super().forward(x)
