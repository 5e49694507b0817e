"""A linear layer whose weight is held in 4 or 8 bits; gradients flow to its input, never to its weight.

Nothing dequantised is kept for the backward pass: it is made again there, one layer at a time. In backward as in
forward the one copy of the codes serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import nn

from luthier.models.quantised import fp8
from luthier.models.quantised.formats import FOUR_BITS, Form, block_of, code_bytes, dequantise, scale_bytes

Multiplies = Literal["16 bits", "fp8", "llm.int8"]
"""How the product is formed: the weight dequantised first, activations in fp8 too, or as bitsandbytes' Linear8bitLt does."""
OUTLIER = 6.0
"""LLM.int8()'s threshold (arXiv:2208.07339): columns of x with a larger magnitude are multiplied in 16 bits."""


class QuantisedLinear(nn.Module):
    """y = x Wᵀ + b with W (out_features, in_features) as `codes` and `scales`, both plain uint8 parameters.

    They have names, so they are saved, moved and sharded like any weight, and being bytes no cast of floating
    parameters reaches them. There is no `weight`: what would read it would take codes for weights.

    Attributes:
        computes_in: the dtype of the 16-bit layers around it.
        multiplies: how the product is formed.
        product_in: the dtype it is formed in, x's own where it is None.
        threshold: of LLM.int8(): columns of x with a larger magnitude are multiplied in 16 bits.
        is_given: the codes are those of a folder that was quantised already.
    """

    codes: nn.Parameter
    scales: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, form: Form, dtype: torch.dtype, *, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form, self.computes_in = in_features, out_features, form, dtype
        self.multiplies: Multiplies = "16 bits"
        self.product_in: torch.dtype | None = None
        self.threshold, self.is_given = OUTLIER, False
        self.codes = _bytes(torch.empty(out_features, code_bytes(in_features, form), dtype=torch.uint8, device="meta"))
        self.scales = _bytes(torch.empty(out_features, scale_bytes(in_features, form), dtype=torch.uint8, device="meta"))  # fmt: skip
        self.register_parameter("bias", bias)

    def fill(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Take codes and scales over as they are."""
        self.codes, self.scales = _bytes(codes), _bytes(scales)

    @property
    def W_q(self) -> torch.Tensor:
        """Marks the layer, to peft, as one whose weight is got by `dequantize()`."""
        return self.codes

    def dequantize(self) -> torch.Tensor:
        """The weight as it computes: a new tensor (out_features, in_features) in the dtype of the 16-bit layers."""
        return dequantise(self.codes, self.scales, self.form, self.computes_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in_features) to (…, out_features), in x's dtype."""
        inner = x if self.product_in is None else x.to(self.product_in)
        bias = self.bias if self.bias is None else self.bias.to(inner.dtype)
        product = _Product.apply(inner, self.codes, self.scales, bias, self.form, self.multiplies, self.threshold)
        return cast(torch.Tensor, product).to(x.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, form={self.form}"


def quantised_layers(model: nn.Module) -> list[QuantisedLinear]:
    """Every quantised layer of a model."""
    return [module for module in model.modules() if isinstance(module, QuantisedLinear)]


@contextmanager
def plain_form(model: nn.Module) -> Iterator[bool]:
    """Multiply as plain libraries do that open the same base; yields whether that is another way than before.

    nf4 is multiplied as bitsandbytes does in any case. bitsandbytes has int8 only as LLM.int8(), which rounds activations;
    fp8 is compared with a 16-bit model that holds the dequantised weights.
    """
    before = {layer: layer.multiplies for layer in quantised_layers(model)}
    for layer in before:
        layer.multiplies = "llm.int8" if layer.form == "int8" else "16 bits"
    try:
        yield any(layer.multiplies != was for layer, was in before.items())
    finally:
        for layer, was in before.items():
            layer.multiplies = was


class _Product(torch.autograd.Function):
    """x Wᵀ + b, and the gradient of x (and b)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        form: Form,
        multiplies: Multiplies,
        threshold: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.form, ctx.multiplies = form, multiplies
        if multiplies == "fp8":
            product = fp8.forward(x, codes, scales)
            return product if bias is None else product + bias
        if multiplies == "llm.int8":
            return _llm_int8(x, codes, scales, bias, threshold)
        if (
            form in FOUR_BITS
        ):  # as bitsandbytes' Linear4bit, whose kernels for few rows give other bits than a dequantised product
            shape = [codes.shape[0], x.shape[-1]]
            absmax, block = scales.view(torch.float32), block_of(codes, scales)
            return torch.ops.bitsandbytes.gemm_4bit.default(x, codes.view(-1, 1), shape, absmax.reshape(-1), block, form, bias=bias)  # fmt: skip
        return nn.functional.linear(x, dequantise(codes, scales, form, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        codes, scales = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.multiplies == "fp8":
                of_x = fp8.backward(grad, codes, scales)
            else:
                of_x = grad @ dequantise(codes, scales, ctx.form, grad.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, None, None, of_bias, None, None, None


def _llm_int8(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """The product as bitsandbytes' Linear8bitLt forms it: rows of x in int8 too, columns with outliers in 16 bits."""
    flat = x.reshape(-1, x.shape[-1])
    rows, row_scales, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant.default(flat.to(torch.float16), threshold)
    product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default(
        flat, rows, codes.view(torch.int8), row_scales, scales.view(torch.float32).reshape(-1), outliers, bias
    )
    return product.reshape(*x.shape[:-1], codes.shape[0])


def _bytes(tensor: torch.Tensor) -> nn.Parameter:
    parameter: Any = nn.Parameter(tensor, requires_grad=False)
    parameter._is_hf_initialized = True  # transformers would otherwise draw random weights for it
    return parameter
