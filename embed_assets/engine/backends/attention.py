"""Attention over packed texts: end to end in one sequence, without padding, each text attending only to itself.

transformers lets a program register an attention function by name. This one gets the boundaries between the texts
(``cu_seq_lens_q``) and attends within them: on CUDA by torch's variable-length flash attention, elsewhere text by text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "embed_assets_packed"
"""The registered name. It must not contain "flash", "sdpa" or "flex", or transformers looks for those packages."""


def register_attention() -> None:
    """Register `packed_attention` with transformers, which builds no mask for a name without a mask function."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each text.

    `query` has shape (1, heads, tokens, head size). Returns a tensor of shape (1, tokens, heads, head size), and None
    for the weights. Raises ``NotImplementedError`` for unsupported variants, so that the model runs padded instead.
    """
    if cu_seq_lens_q is None or attention_mask is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError(
            "packed attention needs the texts' boundaries, and supports no mask, softcap or sinks"
        )
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    # transformers counts the token itself as part of the window, flash attention does not.
    reach = sliding_window - 1 if sliding_window else -1
    if query.is_cuda:
        import torch
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        scale = 1 / math.sqrt(query.shape[3]) if scaling is None else scaling
        options = varlen_options(_parameters(varlen_attn), query.shape[3], scale, causal, reach, grouped)
        boundaries = cu_seq_lens_q
        out = varlen_attn(q, k, v, boundaries, boundaries, max_length_q, max_length_q, **options)
        assert isinstance(out, torch.Tensor)  # it is a tuple only with `return_aux`
        return out[None], None
    return _attention_by_text(query, key, value, cu_seq_lens_q.tolist(), scaling, causal, reach)[None], None


def varlen_options(
    known: Mapping[str, object], head_size: int, scale: float, causal: bool, reach: int, grouped: bool
) -> dict[str, Any]:
    """Keyword arguments for torch's `varlen_attn`, of which its release knows those in `known`.

    A token sees others up to `reach` away, and all with -1. torch 2.10 has only `is_causal`; 2.11 has `scale` and
    `window_size`, and groups heads by itself; `enable_gqa` and `num_splits` came with 2.12. Raises
    ``NotImplementedError`` for what a release can't do, so that the model runs padded instead.
    """
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scale
    elif not math.isclose(scale, 1 / math.sqrt(head_size)):
        raise NotImplementedError(f"this torch scales attention by the head size only, not by {scale:g}")
    if "window_size" in known:
        options["window_size"] = (reach, 0 if causal else reach)
    elif reach >= 0:
        raise NotImplementedError("this torch has no attention within a window over packed texts")
    else:
        options["is_causal"] = causal
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    if "num_splits" in known:
        # One split keeps vectors independent of the batch, and torch from cuDNN's kernel, which was measured four times
        # as slow: https://github.com/pytorch/pytorch/issues/187770.
        options["num_splits"] = 1
    return options


@cache
def _parameters(function: Callable[..., object]) -> Mapping[str, object]:
    return inspect.signature(function).parameters


def _attention_by_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: list[int],
    scaling: float | None,
    causal: bool,
    reach: int,
) -> torch.Tensor:
    """Attention within each text by torch's ordinary kernel: shape (tokens, heads, head size).

    Neighbours of equal length are computed in one call.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    out = torch.empty((query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    grouped = query.shape[1] != key.shape[1]
    first = 0
    while first < len(boundaries) - 1:
        length = boundaries[first + 1] - boundaries[first]
        last = first + 1
        while last < len(boundaries) - 1 and boundaries[last + 1] - boundaries[last] == length:
            last += 1
        place, texts = slice(boundaries[first], boundaries[last]), last - first
        q, k, v = (
            tensor[0, :, place].view(tensor.shape[1], texts, length, tensor.shape[3]).transpose(0, 1)
            for tensor in (query, key, value)
        )
        mask = _window_mask(length, causal, reach) if 0 <= reach < length - 1 else None
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=grouped
        )
        out[place].view(texts, length, *out.shape[1:]).copy_(attended.transpose(1, 2))
        first = last
    return out


def _window_mask(length: int, causal: bool, reach: int) -> torch.Tensor:
    """Mask of shape (length, length), True where a token (row) sees another (column) at most `reach` away."""
    import torch

    places = torch.arange(length)
    distance = places[:, None] - places[None, :]
    return (distance.abs() <= reach) & (distance >= 0) if causal else distance.abs() <= reach
