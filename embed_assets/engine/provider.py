"""The interface of a model provider: it resolves settings to an embedding space and loads the space's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from embed_assets.engine.backend import Backend
from embed_assets.engine.backends.quantization import QuantizedModel
from embed_assets.engine.space import EmbeddingSpace, ModelChoice


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How to send requests to a server that runs the model."""

    concurrency: int = 4
    """Requests in flight at a time: enough to keep a server busy during round trips, few enough not to flood it."""
    batch_texts: int | None = None
    """Maximum texts per request; None: as many as the server says it accepts."""
    requests_per_minute: int | None = None
    """Rate limit; None: no limit."""
    tokens_per_minute: int | None = None
    """Rate limit; None: no limit."""
    patience_seconds: float = 300.0
    """How long a request is retried after transient failures: rate limits are per minute, and a server takes a few
    minutes to load its model."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run the model. Apart from rounding, no option changes a vector."""

    device: str = "auto"
    """A torch device, or "auto" for the fastest available."""
    precision: str = "auto"
    """"float32", "bfloat16", "float16" or "int8"; "auto" chooses by device and model."""
    max_batch_tokens: int | None = None
    """Tokens per forward pass; None: the default, or what tuning finds."""
    compiles: bool = False
    """Whether to run torch.compile first: it takes about half a minute, which long jobs on a GPU win back."""
    library: str = ""
    """Which of the provider's libraries runs the model; empty for its default."""
    quantized: QuantizedModel | None = None
    """The model's int8 form, if that is to run."""
    endpoint: EndpointOptions = EndpointOptions()
    """Only for models behind an endpoint."""


class Provider(Protocol):
    """A module in `engine/providers/`. `catalog.py` maps models to providers."""

    @property
    def libraries(self) -> Sequence[str]:
        """Libraries that can run its models on this machine, for tuning to compare; empty if models run elsewhere."""
        ...

    def resolve(self, choice: ModelChoice) -> EmbeddingSpace:
        """The space that `choice` names, without loading the model. Raises ``ModelError`` or ``SettingsError``."""
        ...

    def load(self, space: EmbeddingSpace, options: EngineOptions) -> Backend:
        """The space's model, loaded. Raises ``ModelError`` or ``SettingsError`` when it can't be loaded."""
        ...
