"""Which arithmetic the model runs in. Pure."""

from __future__ import annotations

from embed_assets.errors import SettingsError

FLOAT16_MODELS = frozenset({"bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert", "mpnet"})
"""Architectures whose activations stay far inside float16's range. Others overflow: Gemma, Qwen and their kin."""


def choose_precision(setting: str, device: str, capability: tuple[int, int] | None, model_type: str) -> str:
    """ "float32", "bfloat16" or "float16" for a model of `model_type` on `device`.

    `capability` is CUDA's compute capability. "auto" is bfloat16 where CUDA has it in hardware (8.0 and later),
    float16 on older GPUs for models known to stay in its range, float32 everywhere else; the checkpoint's own dtype
    never decides. Raises ``SettingsError`` for what the device can't do.
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
