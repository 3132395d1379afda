"""Runs models in the format of sentence-transformers, from the Hub, a folder or a Python package.

They run in torch, or in OpenVINO where tuning found that to be faster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from embed_assets.engine.backend import Backend
from embed_assets.engine.backends.openvino_backend import load_openvino_backend
from embed_assets.engine.backends.openvino_library import has_openvino
from embed_assets.engine.backends.parity import InaccurateError
from embed_assets.engine.backends.torch_backend import load_torch_backend
from embed_assets.engine.hardware import resolve_device
from embed_assets.engine.model import LocalSpace, find_directory, require_local
from embed_assets.engine.model_files import (
    hash_modules,
    hash_tokenizer,
    hash_weights,
    max_seq_length_of,
    read_json,
    tokenizer_file,
)
from embed_assets.engine.precision import precisions_for
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.space import EmbeddingSpace, ModelChoice
from embed_assets.errors import ModelError

Loaded = TypeVar("Loaded")

libraries: Sequence[str] = ("torch", "openvino")
_log = logging.getLogger(__name__)


def resolve(choice: ModelChoice) -> LocalSpace:
    """The space of the model's files. The Hub is asked only when its local cache does not have the model.

    Raises ``ModelError`` when the model can't be found or its files are unusable.
    """
    directory = find_directory(choice.model, choice.revision)
    config = read_json(directory / "config_sentence_transformers.json")
    prompts = {str(k): str(v) for k, v in (config.get("prompts") or {}).items()}
    default = prompts.get(str(config.get("default_prompt_name")), "")
    query = prompts.get("query", default)
    return LocalSpace(
        choice.model,
        weights_hash=hash_weights(directory, choice.allow_pickled_weights),
        tokenizer_hash=hash_tokenizer(directory),
        modules_hash=hash_modules(directory, with_code=choice.trust_remote_code),
        max_seq_length=max_seq_length_of(directory),
        prompt=default if choice.prompt is None else prompts.get(choice.prompt, choice.prompt),
        query_prompt=query if choice.query_prompt is None else prompts.get(choice.query_prompt, choice.query_prompt),
        truncate_dim=choice.truncate_dim,
        tokenizer_json=tokenizer_file(directory).read_text("utf-8"),
        directory=directory,
        trust_remote_code=choice.trust_remote_code,
        allow_pickled_weights=choice.allow_pickled_weights,
    )


def load(space: EmbeddingSpace, options: EngineOptions) -> Backend:
    """The model in the library that `options` names; in torch where OpenVINO can't run it.

    Raises ``ModelError`` when the model can't be loaded, ``SettingsError`` for a device or precision that this machine
    does not have.
    """
    local = require_local(space, "sentence-transformers")
    device = resolve_device(options.device)
    model_type = str(read_json(tokenizer_file(local.directory).parent / "config.json").get("model_type"))
    precisions = precisions_for(options.precision, device.kind, device.capability, model_type)
    if options.library == "openvino" and device.kind == "cpu" and not options.compiles and has_openvino():
        try:
            return load_openvino_backend(local, precisions[0])
        except ModelError as error:
            _log.warning("using torch instead of OpenVINO: %s", error)
    return first_accurate(
        precisions, lambda precision: load_torch_backend(local, device.name, precision, options.compiles)
    )


def first_accurate(precisions: Sequence[str], load: Callable[[str], Loaded]) -> Loaded:
    """What `load` gives for the first precision that is accurate enough. Warns about each that is not.

    Raises ``InaccurateError`` if none is.
    """
    *preferred, last = precisions
    for precision in preferred:
        try:
            return load(precision)
        except InaccurateError as error:
            _log.warning("trying the next precision after %s: %s", precision, error)
    return load(last)
