"""The exported graph against timm's plain export, in one ONNX Runtime process on the CPU.

python -m benchmarks.graph [VARIANT ...] [--threads 1 2] [--batches 1 8] [--seconds 20]

Weights are random, which no runtime sees. All sessions of a row take turns, forwards and backwards,
so that whatever else the machine does hits them alike; a ratio is taken within a turn.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.onnx import export_onnx, write_onnx
from models.golden import golden_images
from models.metaformer import MetaFormer
from models.onnx_runtime import import_onnxruntime
from models.package import InputSpec
from models.serving import ServedModel
from models.variants import ARCHITECTURES
from tests.reference import randomise, timm_model

# One of each family. timm has no IdentityFormer: it is timm's own generic class with an identity
# mixer. It has nothing like RandFormer: there our unfolded graph is the only thing to compare with.
VARIANTS = ("caformer_s18", "convformer_s18", "poolformerv2_s12", "identityformer_s12",
            "randformer_s12")  # fmt: skip
TIMM, BARE, TRAINED, FOLDED = "timm", "timm, no normalisation", "ours, unfolded", "ours"
CLASSES = 1000
Feed = dict[str, NDArray[Any]]


class Normalised(nn.Module):
    """timm's network behind the usual normalisation, doing the work that our graph does."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 (B, H, W, 3) -> logits."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        logits: Tensor = self.network((pixels - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class Row:
    """What one graph took, turn by turn, in milliseconds."""

    graph: str
    times: NDArray[np.float64]


def export_all(variant: str, folder: Path) -> dict[str, Path]:
    """Export the same weights in every way there is, first the one to compare with."""
    architecture = ARCHITECTURES[variant]
    spec = InputSpec(size=architecture.input_size)
    network = randomise(MetaFormer(architecture, CLASSES), 1).eval().requires_grad_(False)
    paths = {}
    if "random" not in architecture.mixers:
        twin = timm_model(variant, CLASSES)
        state, shapes = network.state_dict(), twin.state_dict()
        twin.load_state_dict({key: state[key].reshape(shapes[key].shape) for key in state})
        example = torch.from_numpy(golden_images(spec.size, 2))
        paths[TIMM] = plain_export(Normalised(twin, spec).eval(), example, folder / "timm.onnx")
        floats = torch.zeros(2, 3, spec.size, spec.size)
        paths[BARE] = plain_export(twin, floats, folder / "bare.onnx")
    served = ServedModel(network, spec).eval()
    paths |= {TRAINED: folder / "trained.onnx", FOLDED: folder / "folded.onnx"}
    write_onnx(served, spec.size, paths[TRAINED])
    export_onnx(served, spec.size, paths[FOLDED])
    return paths


def plain_export(model: nn.Module, example: Tensor, path: Path) -> Path:
    """Export as anyone would: the exporter's own defaults and a named batch axis."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (example,), None, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
        )
    assert program is not None
    program.save(path, external_data=False)
    return path


def measure(paths: dict[str, Path], threads: int, batch: int, seconds: float) -> Iterator[Row]:
    """Run all graphs in turns for about `seconds`; their logits must agree."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Else the threads of one session spin for a while beside those of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CPUExecutionProvider"]
    sessions = {
        name: ort.InferenceSession(path, options, providers=providers)
        for name, path in paths.items()
    }
    feeds = {name: feed(session, batch) for name, session in sessions.items()}
    logits = [session.run(None, feeds[name])[0] for name, session in sessions.items()]
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4, rtol=0)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        for name in list(sessions)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sessions[name].run(None, feeds[name])
            times[name].append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() > end and turn >= 4:
            break
    for name, measured in times.items():
        yield Row(name, np.array(measured))


def feed(session: Any, batch: int) -> Feed:
    """Return a session's input: bytes, or what timm's network takes of the same bytes."""
    (taken,) = session.get_inputs()
    size = max(side for side in taken.shape if isinstance(side, int))
    images = golden_images(size, batch)
    if taken.type == "tensor(uint8)":
        return {taken.name: images}
    spec = InputSpec(size=size)
    floats = (images / 255 - spec.mean) / spec.std
    return {taken.name: np.ascontiguousarray(floats.transpose(0, 3, 1, 2), np.float32)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="per row of four graphs")
    arguments = parser.parse_args()
    print(described())
    print("\n| variant | threads | batch | graph | min ms | median ms | min ratio | median ratio |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            paths = export_all(variant, Path(folder))
            for threads, batch in itertools.product(arguments.threads, arguments.batches):
                rows = list(measure(paths, threads, batch, arguments.seconds))
                for row in rows:
                    print(f"| {variant} | {threads} | {batch} | {line(row, rows[0])} |", flush=True)


def line(row: Row, first: Row) -> str:
    """Return the last cells of a row; ratios say how many times as fast as the first graph."""
    ratios = first.times / row.times
    return (
        f"{row.graph} | {row.times.min():.1f} | {np.median(row.times):.1f} "
        f"| {first.times.min() / row.times.min():.3f} | {np.median(ratios):.3f}"
    )


def described() -> str:
    """Return machine, versions and date."""
    names = ("onnxruntime", "torch", "onnx", "onnxscript", "timm", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((one.split(":")[1].strip() for one in lines if one.startswith("model name")), "?")
    flags = next((one.split() for one in lines if one.startswith("flags")), [])
    wide = next((name for name in ("avx512f", "avx2") if name in flags), platform.machine())
    count = sum(one.startswith("processor") for one in lines)
    machine = f"{cpu} ({wide}), {count} processors"
    return f"{machine}; Python {platform.python_version()}, {versions}; {datetime.now(UTC).date()}"


if __name__ == "__main__":
    main()
