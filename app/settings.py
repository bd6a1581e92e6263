"""The one Settings class: `METASERVE_*` variables, or flags of the same names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import StartupError

PREFIX = "METASERVE_"


def _as_number(value: object) -> object:
    """Turn digits into a number: a Literal does not, and variables are texts."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


class Settings(BaseSettings):
    """What the service does; nothing else reads the environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        # `NAME=` is how compose files and shells leave a variable unset.
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )

    model: str = Field(
        "caformer_digits",
        description="A package directory, a name in the model store, an embedded model, or a "
        "published checkpoint, which is fetched and exported on first use.",
    )
    model_store: Path | None = Field(
        None,
        description="A directory of model packages. Unset, what is exported on first use goes into "
        "the user's cache directory.",
    )
    backend: Literal["onnxruntime", "torch", "tensorrt", "triton", "fake"] = Field(
        "onnxruntime",
        description="What runs the network. `tensorrt` needs a package with an engine for this "
        "GPU, `triton` a server at TRITON_URL; `fake` answers from the mean of the pixels, for "
        "load tests.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to run; `auto` takes a GPU where backend and machine have one."
    )
    ort_provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto",
        description="Execution provider of the onnxruntime backend; `auto` follows DEVICE. "
        "One that is missing is an error at start.",
    )
    torch_compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the torch backend compiles the network, for each batch size; `auto` "
        "does so on a GPU where a compiler is installed.",
    )
    torch_precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="Precision of the torch backend's weights; `auto` is bf16 on a GPU and fp32 "
        "on the CPU.",
    )
    cuda_graphs: bool = Field(
        True,
        description="Capture a CUDA graph for each batch size on a GPU; off where capturing makes "
        "trouble.",
    )
    ort_cache_dir: Path | None = Field(
        None,
        description="Where the TensorRT provider of onnxruntime keeps its engines; "
        "metaserve/onnxruntime in the user's cache (XDG_CACHE_HOME, ~/.cache) when unset.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="Port to listen on; 0 takes a free one and logs it."
    )
    workers: Annotated[int, Field(ge=1)] = Field(
        1,
        description="HTTP processes. They share the CPUs, and THREADS, among them; what they share "
        "of the engine, ENGINE says.",
    )
    engine: Literal["auto", "own", "shared"] = Field(
        "auto",
        description="Whether each HTTP process has an engine of its `own`, or all feed one "
        "`shared` engine process. `auto` shares where several processes use one GPU or Triton "
        "server.",
    )
    max_batch_size: Annotated[int, Field(ge=1, le=1024)] = Field(
        32, description="Upper limit of a batch; warm-up may find a smaller one as fast."
    )
    max_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = Field(
        0.0,
        description="How long the oldest waiting image may wait for company; 0 takes what is "
        "there when the backend is free.",
    )
    queue_budget_ms: Annotated[float, Field(gt=0)] = Field(
        5000.0, description="Longest predicted wait at which an image is still admitted."
    )
    request_timeout_ms: Annotated[float, Field(gt=0)] = Field(
        30_000.0,
        description="Deadline of a request, and the most a caller's X-Request-Timeout-Ms may ask.",
    )
    receive_timeout_ms: Annotated[float, Field(gt=0)] = Field(
        30_000.0, description="How long a request body may take to arrive."
    )
    overload_status: Annotated[Literal[503, 429], BeforeValidator(_as_number)] = Field(
        503, description="Status of `overloaded` refusals."
    )
    body_limit_bytes: Annotated[int, Field(ge=1)] = Field(
        32 * 1024 * 1024, description="Largest request body."
    )
    max_images: Annotated[int, Field(ge=1)] = Field(256, description="Most images in one request.")
    # Above, Pillow itself refuses; see images/decode.py.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(
        64_000_000, description="Most pixels an image may have, read from its header."
    )
    decode: Literal["exact", "scaled", "fast"] = Field(
        "scaled",
        description="`scaled` decodes a JPEG much larger than needed at reduced size; `exact` "
        "never does; `fast` does, and resizes with the extra `fast`, a few levels from timm.",
    )
    exif_orientation: bool = Field(
        True, description="Turn photographs upright as their EXIF data says."
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="CPU threads of the backend and of decoding; 0 takes the container's limit."
    )
    lanes: Annotated[int, Field(ge=0, le=1024)] = Field(
        0,
        description="Batches of one thread that the onnxruntime backend may run side by side on a "
        "CPU; kept unless warm-up finds that they answer 5 % fewer images a second than "
        "batches on all threads. 0 tries as many as there are threads. They hold the weights a "
        "second time in memory; 1 never does.",
    )
    stall_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0, description="Liveness fails when work waits and nothing completes for this long."
    )
    keep_alive_s: Annotated[float, Field(gt=0)] = Field(
        75.0,
        description="How long a connection may rest between two requests. Longer than the "
        "balancer's own limit, so that it never sends on a connection that is being closed: 60 s "
        "is usual, some keep theirs for 600 s or an hour.",
    )
    drain_delay_s: Annotated[float, Field(ge=0)] = Field(
        5.0, description="How long SIGTERM keeps serving, unready, before it stops accepting."
    )
    drain_timeout_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="How long admitted requests may take to finish after that."
    )
    api_keys_file: Path | None = Field(
        None, description="A file with one API key a line; when set, requests must carry one."
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="Serve /metrics on this port instead of PORT."
    )
    triton_url: str = Field(
        "localhost:8001", description="gRPC address of the Triton server, for BACKEND=triton."
    )
    triton_model: str | None = Field(
        None, description="Model name on the Triton server; the package's name when unset."
    )
    triton_wait_s: Annotated[float, Field(ge=0)] = Field(
        10.0,
        description="How long a start waits for the Triton server and its model; 0 asks once.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="`auto` writes text to a terminal and JSON elsewhere."
    )
    fake_batch_ms: Annotated[float, Field(ge=0)] = Field(
        0.0, description="How long a batch takes on the `fake` backend."
    )


def load_settings(flags: Mapping[str, str] | None = None) -> Settings:
    """Read the settings; a flag goes before a variable.

    Args:
        flags: field name -> value, from the command line.

    Raises:
        StartupError: an unknown variable (with its nearest match) or a value out of range.
    """
    _refuse_unknown(os.environ)
    given: dict[str, Any] = dict(flags or {})
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).lower() if first["loc"] else "settings"
        shown = f"--{name.replace('_', '-')}" if name in given else f"{PREFIX}{name.upper()}"
        message = first["msg"][0].lower() + first["msg"][1:]
        raise StartupError(f"{shown}={first['input']!r} cannot be used: {message}") from error


def as_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that give a process of ours these settings."""
    changed = settings.model_dump(mode="json", exclude_defaults=True)
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in changed.items()}


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    """pydantic-settings ignores variables it does not know, misspelt ones too."""
    known = [name.upper() for name in Settings.model_fields]
    for name in sorted(environment):
        if not name.upper().startswith(PREFIX):
            continue
        own = name.upper().removeprefix(PREFIX)  # compared alone: with its prefix all look alike
        is_link = own == "PORT" and environment[name].startswith("tcp://")
        if own not in known or is_link:
            if is_link or own.startswith(("SERVICE_", "PORT_")):
                raise StartupError(
                    f"{name} is not ours: Kubernetes sets it for a Service named metaserve; put "
                    "enableServiceLinks: false into the Pod's spec"
                )
            nearest = get_close_matches(own, known, n=1)
            hint = (
                f"did you mean {PREFIX}{nearest[0]}?"
                if nearest
                else "docs/settings.md lists them all"
            )
            raise StartupError(f"there is no setting {name}; {hint}")
