"""Builds a model's input from a batch's token ids: one int32 array on the host, one copy, split on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from embed_assets.engine.batching import Batch
from embed_assets.engine.tokenization import TokenizedTexts

if TYPE_CHECKING:
    import torch


def packed_array(tokens: TokenizedTexts, batch: Batch, first_position: int) -> np.ndarray:
    """One int32 array for a packed batch: token ids, positions, the number of each token's text, the boundaries between
    texts (one more than there are texts), and the rows."""
    lengths = tokens.lengths[batch.rows]
    boundaries = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=boundaries[1:])
    numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    within = np.arange(batch.tokens, dtype=np.int32) - boundaries[numbers]
    ids = tokens.ids[tokens.offsets[batch.rows][numbers] + within]
    positions = within + np.int32(first_position)
    return np.concatenate([ids, positions, numbers, boundaries, batch.rows], dtype=np.int32, casting="same_kind")


def packed_features(array: torch.Tensor, batch: Batch, longest: int) -> tuple[dict[str, Any], torch.Tensor]:
    """The model's features and the rows (int64), split from a `packed_array` on the device."""
    import torch

    tokens, texts = batch.tokens, len(batch.rows)
    ids, positions, numbers, boundaries, rows = torch.split(array, [tokens, tokens, tokens, texts + 1, texts])
    features = {
        "input_ids": ids.long()[None],
        "position_ids": positions.long()[None],
        "seq_idx": numbers[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return features, rows.long()


def pooling_mode(module: Any) -> str | None:
    """How a sentence-transformers module pools, if `pool` can do it; None for other modules and modes."""
    if type(module).__name__ != "Pooling" or not getattr(module, "include_prompt", True):
        return None
    mode = getattr(module, "pooling_mode", None)
    modes = (mode,) if isinstance(mode, str) else tuple(mode or ())
    return modes[0] if len(modes) == 1 and modes[0] in ("mean", "cls", "lasttoken") else None


def pool(features: dict[str, Any], mode: str) -> torch.Tensor:
    """Pool packed token embeddings by text: shape (texts, hidden size).

    sentence-transformers does the same, but before 6.2 its host waits for the device in each batch.
    """
    import torch

    tokens: torch.Tensor = features["token_embeddings"][0]
    boundaries: torch.Tensor = features["cu_seq_lens_q"]
    if mode == "cls":
        return tokens.index_select(0, boundaries[:-1])
    if mode == "lasttoken":
        return tokens.index_select(0, boundaries[1:] - 1)
    lengths = (boundaries[1:] - boundaries[:-1])[:, None]
    sums = torch.zeros((len(lengths), tokens.shape[1]), dtype=tokens.dtype, device=tokens.device)
    return sums.index_add_(0, features["seq_idx"][0], tokens) / lengths


def padded_ids(tokens: TokenizedTexts, batch: Batch, pad_id: int, pads_left: bool = False) -> np.ndarray:
    """Token ids of a batch, filled up with `pad_id`: int32, shape (rows, width)."""
    lengths = tokens.lengths[batch.rows]
    ids = np.full((len(lengths), batch.width), pad_id, dtype=np.int32)
    is_token = _is_token(lengths, batch.width, pads_left)
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(numbers)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids[is_token] = tokens.ids[tokens.offsets[batch.rows][numbers] + within]
    return ids


def attention_mask(tokens: TokenizedTexts, batch: Batch, pads_left: bool = False) -> np.ndarray | None:
    """Mask of a batch: bool, shape (rows, width), True for tokens; None when there is no padding."""
    lengths = tokens.lengths[batch.rows]
    return None if (lengths == batch.width).all() else _is_token(lengths, batch.width, pads_left)


def _is_token(lengths: np.ndarray, width: int, pads_left: bool) -> np.ndarray:
    places = np.arange(width)
    return np.asarray((width - 1 - places if pads_left else places)[None, :] < lengths[:, None])


def padded_array(tokens: TokenizedTexts, batch: Batch, pad_id: int, pads_left: bool) -> tuple[np.ndarray, bool]:
    """One int32 array for a padded batch, and whether it has padding.

    The array holds token ids of shape (rows, width), the mask if there is padding, and the rows.
    """
    mask = attention_mask(tokens, batch, pads_left)
    parts = [
        padded_ids(tokens, batch, pad_id, pads_left).ravel(),
        *([] if mask is None else [mask.ravel()]),
        batch.rows,
    ]
    return np.concatenate(parts, dtype=np.int32, casting="same_kind"), mask is not None


def padded_features(array: torch.Tensor, batch: Batch, has_padding: bool) -> tuple[dict[str, Any], torch.Tensor]:
    """The model's features and the rows (int64), split from a `padded_array` on the device."""
    texts, size = len(batch.rows), len(batch.rows) * batch.width
    features: dict[str, Any] = {"input_ids": array[:size].view(texts, batch.width).long()}
    if has_padding:
        features["attention_mask"] = array[size : 2 * size].view(texts, batch.width).long()
    return features, array[-texts:].long()
