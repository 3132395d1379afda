"""Runs linear layers through oneDNN with weights reordered in advance, about a tenth faster on many CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TYPICAL_TOKENS = 1024
"""Rows that the weights' layout is chosen for: the default token budget on CPUs. Other numbers of rows work too."""


def use_onednn_linears(model: torch.nn.Module) -> int:
    """Replace the float32 linear layers of `model` in place; returns their number, 0 where torch has no oneDNN.

    Only the layout of the weights changes, so vectors are equal up to rounding.
    """
    import torch

    operators = getattr(torch.ops, "mkldnn", None)
    if not torch._C._has_mkldnn or not hasattr(operators, "_linear_pointwise"):
        return 0

    class OneDnnLinear(torch.nn.Module):
        """A linear layer for inference. It has no `weight`, so code that reads it fails instead of going wrong."""

        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_TOKENS)
            self._bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, self._weight, self._bias, "none", [], "")
            return result

    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.weight.dtype == torch.float32:
                setattr(parent, name, OneDnnLinear(child))
                replaced += 1
    return replaced
