"""Chooses the precision a model runs in. Pure functions."""

from __future__ import annotations

from embed_assets.errors import SettingsError

FLOAT16_MODELS = frozenset({"bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert", "mpnet"})
"""Architectures whose activations stay well within float16's range. Gemma, Qwen and their relatives overflow it."""


def choose_precision(setting: str, device: str, capability: tuple[int, int] | None, model_type: str) -> str:
    """The precision that `setting` means for a model of `model_type` on `device`.

    "auto" becomes bfloat16 on GPUs that have it in hardware (CUDA `capability` 8.0 and later), float16 on GPUs from 7.0
    on for models known to stay within its range, and float32 everywhere else; the checkpoint's own dtype plays no part.
    Any other setting is returned unchanged. Raises ``SettingsError`` for float16 on a CPU.
    """
    on_cuda = device.startswith("cuda")
    if setting == "auto":
        if not on_cuda or capability is None:
            return "float32"
        if capability >= (8, 0):
            return "bfloat16"
        return "float16" if capability >= (7, 0) and model_type in FLOAT16_MODELS else "float32"
    if setting == "float16" and device == "cpu":
        raise SettingsError(
            "EMBED_PRECISION=float16 needs a GPU, but the model runs on the CPU; use float32, bfloat16 or int8 there"
        )
    return setting
