"""What the forward keeps for the backward: everything, each block's input, or that and the large products.

`block` runs each block again in the backward pass. `mamba` does too, but the products of `in_proj`, `x_proj`
and `out_proj` with their frozen weights, which are nearly all of the arithmetic, are kept instead of done
again: only norms, convolution, `dt_proj`, the scan and the small adapter products run twice. Per token and
layer that keeps the residual, `xz` and the base's share of `x_dbl`; of `out_proj` only the shape, since
nothing reads its value again (DoRA does, and then it is kept).
"""

from __future__ import annotations

import threading
from functools import partial
from types import MethodType
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mamba_sft.kernels.falcon_mamba import FalconMambaBlock, FalconMambaModel

Policy = Literal["none", "block", "mamba"]

KEPT = ("in_proj", "x_proj", "out_proj")


def keep_activations(model: nn.Module, policy: Policy) -> None:
    """Sets what the blocks of a model keep in training, in place.

    Args:
        model: With our mixer installed, and its adapter attached. Quantized bases work too.
        policy: What to keep; gradients are the same with each.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "mamba":
        options["context_fn"] = _kept_products
    for module in model.modules():
        if isinstance(module, FalconMambaModel | FalconMambaBlock):
            # What `transformers` sets when it is asked for checkpointing, which takes no callables.
            module.gradient_checkpointing = policy != "none"
            module._gradient_checkpointing_func = partial(checkpoint, **options)
        if isinstance(module, FalconMambaBlock) and policy == "mamba":
            for name in KEPT:
                _keep_product(getattr(module.mixer, name), value_read=name != "out_proj")


def _keep_product(projection: nn.Module, *, value_read: bool) -> None:
    base = projection
    while hasattr(base, "base_layer"):
        base = base.base_layer
    if base is not projection:
        # Plain LoRA adds to the base's output and never reads it; variants may, by multiplying it.
        value_read = value_read or bool(getattr(projection, "lora_variant", True))
    if "forward" not in vars(base):
        base.forward = MethodType(_forward_of_kept, base)
    base.value_read = value_read


def _forward_of_kept(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A projection's forward that, in a checkpointed block, computes once and hands out what it kept."""
    products: _Products | None = getattr(_active, "products", None)
    compute = partial(type(self).forward, self, *args, **kwargs)
    if products is None:
        return compute()
    if _active.again:
        return products.give(self)
    # The checkpoint counts saved tensors, and the second pass has none here. They are references to weights.
    with saved_tensors_hooks(_same, _same):
        product = compute()
    products.keep(self, product)
    return product


class _Products:
    """The outputs of the kept projections of one block in one forward."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, tuple[Tensor, bool]] = {}

    def keep(self, projection: Any, product: Tensor) -> None:
        value = product.detach()
        if not projection.value_read:
            value = value.new_zeros(()).expand_as(value)
        self._kept[projection] = value, product.requires_grad

    def give(self, projection: nn.Module) -> Tensor:
        value, requires_grad = self._kept[projection]
        return value.detach().requires_grad_(requires_grad)


_active = threading.local()  # the backward of a GPU has a thread of its own


class _Pass:
    """Inside the context, the kept projections of a block fill (or, in the second pass, read) `products`."""

    def __init__(self, products: _Products, *, again: bool):
        self.products = products
        self.again = again

    def __enter__(self) -> Self:
        _active.products, _active.again = self.products, self.again
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.products = None


def _kept_products() -> tuple[_Pass, _Pass]:
    products = _Products()
    return _Pass(products, again=False), _Pass(products, again=True)


def _same(x: Tensor) -> Tensor:
    return x
