"""What a provider of models is: one module that resolves a setting to a space, and loads the space's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from embed_assets.engine.backend import Backend
from embed_assets.engine.backends.quantization import QuantizedModel
from embed_assets.engine.space import EmbeddingSpace, ModelChoice


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How requests are sent to a server that has the model."""

    concurrency: int = 4
    """Requests at the same time."""
    batch_texts: int | None = None
    """Texts of a request at most; None: as many as the server says it takes."""
    requests_per_minute: int | None = None
    """None: as many as it answers."""
    tokens_per_minute: int | None = None
    patience_seconds: float = 300.0
    """A request that fails in passing is tried again for so long: rate limits are per minute, and a server that loads
    its model takes a few."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run the model. Nothing here changes a vector beyond its precision."""

    device: str = "auto"
    precision: str = "auto"
    max_batch_tokens: int | None = None
    """None: what tuning finds."""
    compiles: bool = False
    """Whether torch.compile optimises the model first: half a minute that long jobs on a GPU win back."""
    library: str = ""
    """Which of the provider's libraries runs the model; empty for its usual one."""
    quantized: QuantizedModel | None = None
    """The model's int8 form, where that is to run."""
    endpoint: EndpointOptions = EndpointOptions()


class Provider(Protocol):
    """A module in `engine/providers/`; `catalog.py` says which models are whose."""

    @property
    def libraries(self) -> Sequence[str]:
        """Libraries that run its models on this machine's devices, to be compared by tuning; none where the models
        do not run on them."""
        ...

    def resolve(self, choice: ModelChoice) -> EmbeddingSpace:
        """The space that the settings name; no model is loaded. Raises ``ModelError`` or ``SettingsError``."""
        ...

    def load(self, space: EmbeddingSpace, options: EngineOptions) -> Backend:
        """The space's model, ready to compute. Raises ``ModelError`` or ``SettingsError`` when it can't be."""
        ...
