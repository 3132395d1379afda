"""Sums up what the engine measures about itself, and advises how to make it faster. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Size of a transformer's arithmetic."""

    linear_weights: int = 0
    """Number of weights in all linear layers: each token takes one multiply-add per weight."""
    attention_width: int = 0
    """Layers x heads x head size: each pair of tokens in a text takes two multiply-adds per unit."""

    def operations(self, lengths: np.ndarray) -> float:
        """Floating-point operations for texts of these `lengths` (tokens), without padding; a multiply-add is two."""
        squares = np.square(lengths.astype(np.float64)).sum()
        return float(2.0 * self.linear_weights * lengths.sum() + 4.0 * self.attention_width * squares)


@dataclass(slots=True)
class EngineStats:
    """Totals over the windows of a run or a partition."""

    texts: int = 0
    tokens: int = 0
    """Without padding."""
    padded_tokens: int = 0
    """Tokens that the device computed, including padding."""
    operations: float = 0.0
    """Floating-point operations, without padding."""
    seconds: float = 0.0
    """Time the device worked."""
    tokenizer_wait_seconds: float = 0.0
    """Time the device waited for the tokenizer."""
    input_wait_seconds: float = 0.0
    """Time the device waited for texts to be read or vectors to be written."""
    gpu_readings: int = 0
    """Number of times the GPU's usage was read."""
    gpu_percent_sum: float = 0.0
    """GPU utilization in percent, summed over the readings."""
    gpu_memory_bytes: int = 0
    """Peak memory in use on the GPU, by all processes."""

    def add(self, other: EngineStats) -> None:
        """Add the totals of `other` to these. Memory takes the maximum."""
        memory = max(self.gpu_memory_bytes, other.gpu_memory_bytes)
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.gpu_memory_bytes = memory

    @property
    def gpu_percent(self) -> float:
        """Mean utilization of the GPU in percent; 0 without one."""
        return self.gpu_percent_sum / self.gpu_readings if self.gpu_readings else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens, without padding, per second that the device worked."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding_percent(self) -> float:
        """Percentage of the computed tokens that were padding."""
        return 100.0 * (1 - self.tokens / self.padded_tokens) if self.padded_tokens else 0.0

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations per second that the device worked, not counting padding."""
        return self.operations / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def tokenizer_wait_percent(self) -> float:
        """Percentage of the time that the device waited for the tokenizer."""
        return self._percent_of_all(self.tokenizer_wait_seconds)

    @property
    def input_wait_percent(self) -> float:
        """Percentage of the time that the device waited for reading and writing."""
        return self._percent_of_all(self.input_wait_seconds)

    def roofline_percent(self, ceiling_gflops: float) -> float:
        """Percentage reached of the device's matrix-product ceiling; 0 when the ceiling is not known."""
        return 100.0 * self.gflops / ceiling_gflops if ceiling_gflops else 0.0

    def _percent_of_all(self, seconds: float) -> float:
        everything = self.seconds + self.tokenizer_wait_seconds + self.input_wait_seconds
        return 100.0 * seconds / everything if everything else 0.0


def advise(stats: EngineStats, ceiling_gflops: float, device: str, precision: str, max_batch_tokens: int) -> str:
    """One line that names the bottleneck and what to change. Empty when nothing was embedded."""
    if not stats.tokens:
        return ""
    # 10 %: with less waste, removing it could gain at most a ninth.
    if stats.tokenizer_wait_percent > 10:
        return (
            f"tokenizer-bound: the device waited {stats.tokenizer_wait_percent:.0f} % of the time for tokens; "
            "give the process more cores"
        )
    if stats.input_wait_percent > 10:
        return (
            f"input-bound: the device waited {stats.input_wait_percent:.0f} % of the time for texts and for the lake; "
            "put source and lake nearer, or make partitions larger"
        )
    if stats.padding_percent > 10:
        return (
            f"padding: {stats.padding_percent:.0f} % of the computed tokens were padding; "
            f"lower EMBED_MAX_BATCH_TOKENS (now {max_batch_tokens:,}) or make partitions larger"
        )
    reached = stats.roofline_percent(ceiling_gflops)
    # 25 and 50 %: well under the 78 to 84 % that float32 was measured to reach on CPUs. GPUs reach less with small
    # models, which leave them waiting for memory and kernel launches.
    if ceiling_gflops and reached < 25 and device != "cpu":
        return (
            f"memory- or launch-bound: {reached:.0f} % of the matrix product of {device}; the model is small for it: "
            "raise EMBED_MAX_BATCH_TOKENS ('embed-assets tune' shows what fits), or use a smaller device"
        )
    if ceiling_gflops and reached < 50:
        return (
            f"memory-bound: {reached:.0f} % of the matrix product of {device}; "
            "'embed-assets tune' finds the budget whose activations fit the caches"
        )
    how = f"{reached:.0f} % of the matrix product of {device}" if ceiling_gflops else "the device is always busy"
    faster = "EMBED_PRECISION=int8 or a GPU" if device == "cpu" and precision != "int8" else "a faster device"
    return f"device-bound: {how}; only a smaller model, {faster} would be faster"
