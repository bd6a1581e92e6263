"""The exported graph: what it is made of, what ONNX Runtime makes of it, and that it is exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from export.onnx import IR_VERSION, OPSET, export_onnx, write_onnx
from models.metaformer import MetaFormer
from models.onnx_runtime import import_onnxruntime
from models.package import InputSpec
from models.precision import cast_network
from models.serving import ServedModel
from models.variants import Architecture
from tests.models import tiny

SPEC = InputSpec(size=32)
# Wide enough for the blocked layout of ONNX Runtime, which takes channels by sixteen.
ATTENTION = replace(tiny.CAFORMER, dims=(16, 32, 64, 64))
# Every activation, scaling, norm and mixer of the paper at least once, with biases and without.
NETWORKS = {
    "caformer": ATTENTION,
    "gelu": replace(
        tiny.ABLATED,
        activation="gelu",
        residual_scaling="branch_scale",
        scaled_stages=(0, 1, 2, 3),
        block_bias=True,
        mixers=("conv", "pooling", "random", "attention"),
    ),
    "relu": replace(
        tiny.ABLATED,
        activation="relu",
        residual_scaling="layer_scale",
        scaled_stages=(0, 1, 2),
        block_bias=True,
        norm="image",
        mixers=("attention", "random", "conv", "pooling"),
    ),
    "squared_relu": replace(
        tiny.ABLATED,
        activation="squared_relu",
        residual_scaling="none",
        norm="image",
        head="linear",
        mixers=("pooling", "attention", "identity", "conv"),
    ),
    "star_relu": replace(
        tiny.ABLATED,
        scaled_stages=(0, 1, 2, 3),
        norm="image",
        block_bias=True,
        mixers=("identity", "conv", "attention", "random"),
    ),
}


@dataclass(frozen=True)
class Exported:
    """A served network, its graph, and its graph as ONNX Runtime runs it."""

    served: ServedModel
    path: Path
    graph: onnx.ModelProto
    optimized: onnx.ModelProto


def served(architecture: Architecture) -> ServedModel:
    network: MetaFormer = tiny.network(architecture)
    return ServedModel(network, SPEC).eval()


def optimize(path: Path) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime runs on this CPU."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it says that such a graph fits this machine alone
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(path.with_suffix(".optimized"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    model = served(ATTENTION)
    export_onnx(model, SPEC.size, path)
    return Exported(model, path, onnx.load(path), optimize(path))


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@cache
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (5, 32, 32, 3), np.uint8)


def answers(path: Path, sizes: tuple[int, ...], threads: int = 1) -> list[NDArray[np.float32]]:
    """Return logits and embedding side by side of all images, asked for in batches of each size."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def ask(size: int) -> NDArray[np.float32]:
        parts = range(0, len(images()), size)
        runs = [session.run(None, {"images": images()[at : at + size]}) for at in parts]
        return np.concatenate([np.concatenate(run, 1) for run in runs])

    return [ask(size) for size in sizes]


def expected(model: ServedModel) -> NDArray[np.float32]:
    with torch.inference_mode():
        return torch.cat(model(torch.from_numpy(images())), 1).numpy()


@pytest.mark.parametrize("architecture", NETWORKS.values(), ids=NETWORKS)
def test_every_ablation_exports_to_the_function_of_its_network_whatever_the_batch(
    architecture: Architecture, tmp_path: Path
) -> None:
    model, path = served(architecture), tmp_path / "model.onnx"

    export_onnx(model, SPEC.size, path)

    for threads in (1, 2):
        together, *others = answers(path, (5, 1, 2, 3, 4), threads)
        assert np.abs(together - expected(model)).max() < 1e-4
        assert np.abs(together[0] - together[1]).max() > 0.1  # the images do differ
        assert all((other == together).all() for other in others)


def test_the_graph_holds_nothing_but_standard_operators_of_opset_20(exported: Exported) -> None:
    assert [(one.domain, one.version) for one in exported.graph.opset_import] == [("", OPSET)]
    assert (OPSET, exported.graph.ir_version) == (20, IR_VERSION)
    assert {node.domain for node in exported.graph.graph.node} == {""}
    assert not exported.graph.functions


def test_no_operator_is_left_that_folding_takes_out(exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "unfolded.onnx"
    write_onnx(exported.served, SPEC.size, path)
    before, after = kinds(onnx.load(path)), kinds(exported.graph)

    blocks, attentions = sum(ATTENTION.depths), 3
    assert (before["Slice"], after["Slice"]) == (3 * attentions, 0)
    # Left are the products of the head, of two residuals in each scaled block, and one square each.
    assert after["Mul"] == 1 + 2 * attentions + (blocks + 3)
    assert before["Mul"] > after["Mul"] + blocks
    # Before: two of a SepConv, two of an MLP, four of an attention, of which three remain.
    assert before["MatMul"] == 2 * 3 + 2 * blocks + 4 * attentions
    assert after["MatMul"] == 3 * attentions
    assert not {"Pow", "Shape", "Gather", "Split"} & after.keys()


def test_the_runtime_fuses_every_relu_of_a_block_and_every_permutation_around_a_chain(
    exported: Exported,
) -> None:
    nodes = exported.optimized.graph.node
    kept = kinds(exported.optimized)
    fused = [
        node
        for node in nodes
        if node.op_type == "Conv"
        and any(one.name == "activation" and one.s == b"Relu" for one in node.attribute)
    ]

    assert len(fused) == sum(ATTENTION.depths) + 3
    assert kept["Relu"] == 0
    # Left are the input's, and in each attention one for the operand of three convolutions and
    # one for the result.
    assert kept["Transpose"] == 1 + 2 * 3
    assert kept["FusedMatMul"] == 2 * 3


def test_a_network_cast_to_half_precision_is_not_folded(tmp_path: Path) -> None:
    model = served(ATTENTION)
    model.network = cast_network(tiny.network(ATTENTION), "fp16")

    export_onnx(model, SPEC.size, tmp_path / "half.onnx")

    kept = kinds(onnx.load(tmp_path / "half.onnx"))
    assert (kept["Slice"], kept["Conv"]) == (9, 1 + 3 + 3)
    np.testing.assert_allclose(
        answers(tmp_path / "half.onnx", (5,))[0], expected(served(ATTENTION)), atol=0.05, rtol=0
    )
