"""A package becomes a model of a Triton repository: its files, a configuration, labels.

<root>/<name>/
    config.pbtxt   shapes, batching, instances, warm-up
    labels.txt     for Triton's own classification extension
    1/             the package itself: METASERVE_MODEL may point here
        model.onnx, manifest.json, golden.npz, ...
        build_plan.sh    tensorrt only: writes model.plan, with the TensorRT that will run it
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from export.staging import staged
from models.buckets import bucket_sizes
from models.package import LABELS, MANIFEST, MODEL, PLAN, Package, PackageError, check_name
from models.tolerances import Precision

Platform = Literal["onnxruntime", "tensorrt"]
Device = Literal["cpu", "gpu", "auto"]

CONFIG = "config.pbtxt"
VERSION = "1"
BUILD_PLAN = "build_plan.sh"

QUEUE_DELAY_US = 100
"""How long a lone batch waits for company: enough for what several callers send at one moment."""

QUEUE_TIMEOUT_US = 30_000_000
"""Longest wait in Triton's queue; a request's own timeout may be shorter, never longer."""

QUEUE_REQUESTS = 64
"""Requests that may wait, each a batch of its caller's; above, Triton refuses at once."""

_KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU", "auto": "KIND_AUTO"}


def write_repository(
    package: Package,
    root: Path,
    *,
    name: str | None = None,
    max_batch_size: int = 32,
    platform: Platform = "onnxruntime",
    device: Device = "auto",
    overwrite: bool = False,
) -> Path:
    """Write a package as `<root>/<name>`, a model that a Triton server loads as it is.

    A TensorRT plan fits one TensorRT and one GPU, so none is written: `1/build_plan.sh` makes it
    where it will run.

    Args:
        package: the model; its files are checked.
        root: the model repository; made where it is missing.
        name: of the model in Triton; the package's when None.
        max_batch_size: largest batch Triton forms, at least 1.
        platform: the Triton backend that runs the model.
        device: what the instances run on; `auto` takes a GPU where there is one.
        overwrite: replace a model of that name.

    Returns:
        `<root>/<name>`, there as a whole or not at all.

    Raises:
        PackageError: the package is damaged or nothing that the platform runs, the place is taken,
            or tritonclient is missing.
    """
    name = name or package.manifest.name
    if max_batch_size < 1:
        raise PackageError(f"a batch holds at least one image, not {max_batch_size}")
    precision = package.manifest.precision
    check_target(root, name, precision, platform, device, overwrite=overwrite)
    if platform == "tensorrt" and PLAN in package.manifest.files:
        raise PackageError(
            f"{package.path} holds a {PLAN}, which may fit another TensorRT than Triton's; give "
            "the package it was made from"
        )
    _ = package.model_path  # refuses a package without the graph to run or build from
    package.check_files()
    config = config_text(package, name, max_batch_size, platform, device)
    with staged(root.resolve() / name) as folder:
        _fill(folder, package, config, max_batch_size, platform)
    return root / name


def check_target(
    root: Path,
    name: str,
    precision: Precision,
    platform: Platform,
    device: Device,
    *,
    overwrite: bool,
) -> None:
    """Refuse what cannot become a model of a repository, before a package is made for it.

    Raises:
        PackageError: the name is none, the place is taken, or the platform does not run it.
    """
    check_name(name)
    if (platform, device) == ("tensorrt", "cpu"):
        raise PackageError("a TensorRT plan runs on a GPU; choose another device than cpu")
    if platform == "onnxruntime" and precision == "bf16":
        raise PackageError(
            f"{name} is in bf16, which onnxruntime does not run; choose "
            "--triton-platform tensorrt, or export it with --precision fp16"
        )
    out = root.resolve() / name
    if out.exists() and not overwrite:
        raise PackageError(f"{out} exists already; choose another name or add --overwrite")
    if out.exists() and not (out / CONFIG).is_file():
        raise PackageError(f"{out} is no model of a Triton repository and stays")


def config_text(
    package: Package, name: str, max_batch_size: int, platform: Platform, device: Device
) -> str:
    """Return `config.pbtxt`: written from Triton's own message and read back.

    Raises:
        PackageError: tritonclient, which defines the message, is missing.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ModuleNotFoundError as error:
        raise PackageError(
            "a Triton repository needs the package tritonclient; install metaserve[triton]"
        ) from error
    config = ModelConfig(
        name=name,
        backend=platform,
        max_batch_size=max_batch_size,
        default_model_filename=MODEL if platform == "onnxruntime" else PLAN,
        version_policy={"latest": {"num_versions": 1}},
        instance_group=[{"kind": _KINDS[device], "count": 1}],
        dynamic_batching=_batching(max_batch_size),
        model_warmup=_warm_up(package, max_batch_size),
        **_tensors(package),
        **_tuning(package, max_batch_size, platform, device),
    )
    text: str = text_format.MessageToString(config)
    # Unknown or misspelt fields raise here and not in somebody's server.
    if text_format.Parse(text, ModelConfig()) != config:
        raise RuntimeError("config.pbtxt does not read back as it was written: this is a bug")
    return text


def _tensors(package: Package) -> dict[str, Any]:
    """Return inputs and outputs; the batch is not among the dims."""
    manifest, side = package.manifest, package.manifest.input.size
    logits = {"name": "logits", "data_type": "TYPE_FP32", "dims": [manifest.classes]}
    if package.labels is not None:
        logits["label_filename"] = LABELS
    embedding = {
        "name": "embedding",
        "data_type": "TYPE_FP32",
        "dims": [manifest.embedding_dim],
    }
    images = {"name": "images", "data_type": "TYPE_UINT8", "dims": [side, side, 3]}
    return {"input": [images], "output": [logits, embedding]}


def _batching(max_batch_size: int) -> dict[str, Any]:
    return {
        "preferred_batch_size": [max_batch_size],
        "max_queue_delay_microseconds": QUEUE_DELAY_US,
        "default_queue_policy": {
            "timeout_action": "REJECT",
            "default_timeout_microseconds": QUEUE_TIMEOUT_US,
            "allow_timeout_override": True,
            "max_queue_size": QUEUE_REQUESTS,
        },
    }


def _warm_up(package: Package, max_batch_size: int) -> list[dict[str, Any]]:
    side = package.manifest.input.size
    images = {"data_type": "TYPE_UINT8", "dims": [side, side, 3], "zero_data": True}
    return [
        {"name": f"batch_{size}", "batch_size": size, "inputs": {"images": images}}
        for size in bucket_sizes(max_batch_size)
    ]


def _tuning(
    package: Package, max_batch_size: int, platform: Platform, device: Device
) -> dict[str, Any]:
    """Return what makes the one or the other backend fast, and keeps float32 exact."""
    if platform == "tensorrt":
        side = package.manifest.input.size
        graphs = [
            {"batch_size": size, "input": {"images": {"dim": [side, side, 3]}}}
            for size in bucket_sizes(max_batch_size)
        ]
        return {"optimization": {"cuda": {"graphs": True, "graph_spec": graphs}}}
    if device == "cpu":
        return {}
    # 1 is cuDNN's heuristic: the exhaustive default searches anew for each new batch size. Triton
    # calls this place deprecated, but its default here overrides what the accelerator's says.
    tuning: dict[str, Any] = {"parameters": {"cudnn_conv_algo_search": {"string_value": "1"}}}
    if package.manifest.precision == "fp32":
        # Triton 24.06 or newer; an older one refuses to load the model, rather than round it.
        cuda = {"name": "cuda", "parameters": {"use_tf32": "0"}}
        tuning["optimization"] = {
            "execution_accelerators": {"gpu_execution_accelerator": [cuda]},
        }
    return tuning


def _build_script(package: Package, max_batch_size: int) -> str:
    side = package.manifest.input.size
    shapes = {
        kind: f"images:{size}x{side}x{side}x3"
        for kind, size in (("min", 1), ("opt", max_batch_size), ("max", max_batch_size))
    }
    # Without it trtexec rounds the factors of every product to TF32, ten bits.
    exact = "--noTF32 " if package.manifest.precision == "fp32" else ""
    return f"""\
#!/bin/sh
# Builds {PLAN} from {MODEL}; a plan fits one TensorRT and one kind of GPU. Run this where the plan
# will run: a container of the TensorRT release in your Triton image, with that GPU.
set -eu
cd "$(dirname "$0")"
trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)
[ -x "$trtexec" ] || {{ echo "no trtexec here; run this in the nvcr.io/nvidia/tensorrt image" \\
    "with the same yy.mm tag as your Triton image" >&2; exit 2; }}
# TensorRT 10 needs to be told that the graph decides on types; 11 knows nothing else.
if "$trtexec" --help | grep -q stronglyTyped; then set -- --stronglyTyped "$@"; fi
"$trtexec" {exact}--onnx={MODEL} --saveEngine={PLAN}.new \\
    --minShapes={shapes["min"]} --optShapes={shapes["opt"]} --maxShapes={shapes["max"]} "$@"
mv {PLAN}.new {PLAN}
"""


def _fill(
    folder: Path, package: Package, config: str, max_batch_size: int, platform: Platform
) -> None:
    version = folder / VERSION
    version.mkdir()
    for name in (MANIFEST, *package.manifest.files):
        shutil.copyfile(package.path / name, version / name)
    if package.labels is not None:
        shutil.copyfile(package.path / LABELS, folder / LABELS)
    if platform == "tensorrt":
        script = version / BUILD_PLAN
        script.write_text(_build_script(package, max_batch_size), "utf-8")
        script.chmod(0o755)
    (folder / CONFIG).write_text(config, "utf-8")
