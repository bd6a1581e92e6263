"""Package -> the same package with a TensorRT engine in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.staging import check_place, staged, write_whole
from export.tensorrt import BuildOptions, Profile, Share, build_plan
from export.tensorrt_network import PlanError
from models.gpu import NoGpuError, find_gpu
from models.package import (
    MANIFEST,
    MODEL,
    PLAN,
    Package,
    PlanSpec,
    hash_files,
    open_package,
)
from models.tensorrt import TensorRTName, import_tensorrt, operating_system


def load_builder(name: TensorRTName = "tensorrt") -> Any:
    """Return the library that builds, on a machine that it can build on.

    Raises:
        PlanError: `tensorrt` is asked for where there is no GPU, or the library is missing.
    """
    if name == "tensorrt":
        compute_capability_for(name)
    try:
        return import_tensorrt(name)
    except ImportError as error:
        raise PlanError(str(error)) from error


def compute_capability_for(name: str) -> str | None:
    """Return what an engine built here will be for; None for all GPUs of `tensorrt_rtx`.

    Raises:
        PlanError: `tensorrt` measures its kernels, and there is no GPU to measure on.
    """
    if name == "tensorrt_rtx":
        return None
    try:
        return find_gpu().compute_capability
    except NoGpuError as error:
        raise PlanError(
            f"TensorRT builds an engine on the GPU it is for, and {error}; "
            "run the export on the machine that will serve"
        ) from error


def add_plan(
    package: Package,
    out: Path,
    trt: Any,
    *,
    max_batch_size: int = 32,
    opt_batch_size: int | None = None,
    options: BuildOptions | None = None,
    cache: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
    share: Share = lambda done: None,
) -> Package:
    """Build an engine of a package's graph and write a package that holds both.

    Its version stays the same, since it is the same network. That the engine computes what the
    network computes is shown where it runs: at every start, and by `metaserve verify`.

    Args:
        package: with a `model.onnx`; its precision becomes the engine's.
        out: the package directory to create.
        trt: the library, from `load_builder`.
        max_batch_size: the largest batch the engine takes.
        opt_batch_size: the batch it is tuned for; the largest when None.
        options: for the builder.
        cache: a directory of engines and kernel timings; an engine that was built there from the
            same graph in the same way is taken instead of a new one.
        overwrite: replace a package at `out`.
        progress: told of each step before it starts.
        share: told how much of the build is done, 0..1.

    Raises:
        PlanError: the engine cannot be built here or of this graph.
        PackageError: the package is damaged or holds no graph, or the place is taken.
    """
    check_place(out, overwrite=overwrite)
    package.check_files()
    manifest, options = package.manifest, options or BuildOptions()
    profile = Profile(max_batch_size, opt_batch_size or max_batch_size)
    spec = _describe(package, trt, profile, options)

    def build() -> bytes:
        progress(f"building a TensorRT engine for batches of 1 to {max_batch_size}")
        return build_plan(
            package.model_path,
            trt=trt,
            input_size=manifest.input.size,
            profile=profile,
            precision=manifest.precision,
            options=options,
            timing_cache=cache / _timings_name(spec) if cache is not None else None,
            share=share,
        )

    with staged(out) as staging:
        for name in manifest.files:
            shutil.copyfile(package.path / name, staging / name)
        (staging / PLAN).write_bytes(_cached(cache, spec, build, progress))
        tools = manifest.tools | {spec.module: spec.version}
        changes = {"plan": spec, "files": dict(hash_files(staging)), "tools": tools}
        # What an engine that was there before has proven says nothing about this one.
        proofs = tuple(proof for proof in manifest.proofs if proof.backend != "tensorrt")
        described = manifest.model_copy(update=changes | {"proofs": proofs})
        (staging / MANIFEST).write_text(described.model_dump_json(indent=2) + "\n", "utf-8")
    return open_package(out)


def _describe(package: Package, trt: Any, profile: Profile, options: BuildOptions) -> PlanSpec:
    """Return what the engine will be, which is known before it is built."""
    _ = package.model_path  # a package without a graph is refused in its own words
    return PlanSpec(
        module=trt.__name__,
        version=trt.__version__,
        compute_capability=compute_capability_for(trt.__name__),
        operating_system=operating_system(),
        min_batch_size=profile.min_batch_size,
        opt_batch_size=profile.opt_batch_size,
        max_batch_size=profile.max_batch_size,
        precision=package.manifest.precision,
        onnx_sha256=package.manifest.files[MODEL],
        options=options.as_dict(),
    )


def _cached(
    cache: Path | None,
    spec: PlanSpec,
    build: Callable[[], bytes],
    progress: Callable[[str], None],
) -> bytes:
    """Return the engine that the cache holds, or build it and put it there."""
    if cache is None:
        return build()
    path = cache / f"{spec.key}.plan"
    if path.exists():
        progress(f"taking the engine that {path} holds")
        return path.read_bytes()
    plan = build()
    write_whole(path, plan)
    return plan


def _timings_name(spec: PlanSpec) -> str:
    """Return the name of a file of timings that no other library or GPU writes to."""
    return f"timings-{spec.module}-{spec.version}-{spec.compute_capability or 'any'}.cache"
