"""Which backend runs a space's model, and the embedder over it."""

from __future__ import annotations

from embed_assets.engine.fake_backend import FakeBackend
from embed_assets.engine.model import EmbeddingSpace, parse_fake
from embed_assets.engine.runner import Backend, Embedder


def load_embedder(
    space: EmbeddingSpace,
    device: str = "auto",
    max_batch_tokens: int | None = None,
    precision: str = "auto",
    compiles: bool = False,
) -> Embedder:
    """The model of `space`, loaded. Raises ``ModelError`` or ``SettingsError`` when it can't be."""
    fake = parse_fake(space.model)
    if fake is not None:
        backend: Backend = FakeBackend(fake, space.truncate_dim)
    else:
        from embed_assets.engine.torch_backend import load_torch_backend

        backend = load_torch_backend(space, device, precision, compiles)
    return Embedder(backend, space.tokenizer, space.max_seq_length, max_batch_tokens)
