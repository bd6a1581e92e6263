"""What is served and what is sent: packages from a seed, graphs of them, images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from app.bench.plan import read_bodies
from benchmarks.graph import plain_export
from export.publish import ExportRequest, export_package
from export.weights import Weights
from models.build import load_served_model
from models.cache import user_cache
from models.metaformer import MetaFormer
from models.package import MANIFEST, PRETRAINED, InputSpec, Package, open_package
from models.variants import Architecture, find_variant
from tests.reference import randomise

PHOTOGRAPH = Path(__file__).parents[1] / "examples/images/china.jpg"
CLASSES = 1000


@dataclass(frozen=True)
class Load:
    """One kind of request on one kind of model.

    Attributes:
        name: for `ONLY=`.
        words: what it shows.
        package: that is served.
        image: the body of each request.
        modes: values of METASERVE_DECODE to measure.
        processes: values of METASERVE_WORKERS to measure; the last is what the hand-written
            service has, too.
        seconds: of a measurement: longer where a request takes long.
        backend: `fake` for next to no model: both services then average pixels.
    """

    name: str
    words: str
    package: Package
    image: bytes
    modes: tuple[str, ...] = ("scaled",)
    processes: tuple[int, ...] = (1,)
    seconds: float = 2.0
    backend: str = "onnxruntime"


class Floats(nn.Module):
    """A network as a plain export has it: normalised floats (N, 3, S, S) -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.permute(0, 2, 3, 1))[0]
        return logits


def cache() -> Path:
    """Return where packages are kept from one run to the next."""
    folder = (user_cache("benchmarks") or Path(".benchmarks")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_loads(cpus: int) -> list[Load]:
    """Build packages that are not there yet, and images."""
    digits = open_package(PRETRAINED / "caformer_digits")
    (tiny,) = read_bodies([])
    caformer = _package("caformer_s18", find_variant("caformer_s18")[0])
    photo = _jpeg((500, 375))
    both = tuple(sorted({1, cpus}))
    fast = ("scaled", "fast")
    return [
        Load("tiny", "32x32 PNG, embedded model: overhead", digits, tiny, processes=both),
        Load("photo", "500x375 JPEG, almost no model: decoding", caformer, photo, fast, both,
             backend="fake"),
        Load("phone", "12-megapixel JPEG, almost no model", caformer, _jpeg((4000, 3000)), fast,
             (cpus,), seconds=4.0, backend="fake"),
        Load("caformer", "500x375 JPEG, caformer_s18: computing", caformer, photo, seconds=6.0),
    ]  # fmt: skip


def float_graph(load: Load) -> Path:
    """Return the hand-written service's graph of a load; exported once."""
    package = load.package
    if load.backend == "fake":
        return _averaging_graph(package.manifest.classes)
    path = cache() / f"{package.manifest.name}-{package.manifest.version}-floats.onnx"
    if not path.exists():
        size = package.manifest.input.size
        # The exporter specialises an axis of length one.
        example = torch.zeros(2, 3, size, size)
        staging = path.with_suffix(".part")
        plain_export(Floats(load_served_model(package).network).eval(), example, staging)
        staging.rename(path)
    return path


def _package(name: str, architecture: Architecture) -> Package:
    folder = cache() / name
    if (folder / MANIFEST).exists():
        return open_package(folder)
    checkpoint = cache() / f"{name}.safetensors"
    save_file(randomise(MetaFormer(architecture, CLASSES), 1).state_dict(), checkpoint)
    weights = Weights(name, architecture, checkpoint, checkpoint.name)
    request = ExportRequest(
        weights, architecture, InputSpec(size=architecture.input_size), folder, overwrite=True
    )
    package = export_package(request, print)
    checkpoint.unlink()
    return package


def _averaging_graph(classes: int) -> Path:
    """Return a graph whose logits are sums of the channels' means: it does almost nothing."""
    weights = numpy_helper.from_array(np.ones((3, classes), np.float32), "weights")
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("MatMul", ["means", "weights"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, None, None])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])]
    graph = helper.make_graph(nodes, "averages", inputs, outputs, [weights])
    path = cache() / f"averages-{classes}.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def _jpeg(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    with Image.open(PHOTOGRAPH) as image:
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
