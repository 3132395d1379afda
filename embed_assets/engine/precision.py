"""Chooses the precision a model runs in. Pure functions."""

from __future__ import annotations

from embed_assets.errors import SettingsError

FLOAT16_MODELS = frozenset({"bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert", "mpnet"})
"""Architectures whose activations stay well within float16's range. Gemma, Qwen and their relatives overflow it."""


def precisions_for(setting: str, device: str, capability: tuple[int, int] | None, model_type: str) -> list[str]:
    """The precisions that `setting` means for a model of `model_type` on `device`, in the order in which to try them.

    "auto" is bfloat16 on GPUs that have it in hardware (CUDA `capability` 8.0 and later), float16 on GPUs from 7.0 on
    for models known to stay within its range, and float32 at last; the checkpoint's own dtype plays no part. Any other
    setting is the only one. Raises ``SettingsError`` for float16 on a CPU.
    """
    if setting == "auto":
        found = capability if device.startswith("cuda") and capability is not None else (0, 0)
        has_range = model_type in FLOAT16_MODELS
        return [*["bfloat16"] * (found >= (8, 0)), *["float16"] * (found >= (7, 0) and has_range), "float32"]
    if setting == "float16" and device == "cpu":
        raise SettingsError(
            "EMBED_PRECISION=float16 needs a GPU, but the model runs on the CPU; use float32, bfloat16 or int8 there"
        )
    return [setting]
