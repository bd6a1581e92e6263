"""Engines built for real by tensorrt_rtx, which needs no GPU for it; the traps are caught."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.signals import ending_by_exception
from export import plan as plan_module
from export.onnx import export_onnx
from export.plan import add_plan, load_builder
from export.tensorrt import BuildOptions, Phases, Profile, build_plan
from export.tensorrt import _configure as configure
from export.tensorrt_network import PlanError, parse_network, precision_of
from models.gpu import Gpu, NoGpuError
from models.package import (
    PLAN,
    BackendProof,
    InputSpec,
    Manifest,
    Package,
    PackageError,
    find_package,
    open_package,
    sha256_file,
)
from models.precision import cast_network
from models.serving import ServedModel
from models.tensorrt import error_log, operating_system
from models.tolerances import Precision
from models.variants import Architecture, Mixer
from tests.models.tiny import ABLATED, CAFORMER, POOLFORMERV2, network
from tests.required import require

SIZE = 8
PROFILE = Profile(max_batch_size=4, opt_batch_size=2)


@pytest.fixture(scope="module")
def trt() -> Any:
    require("tensorrt_rtx")
    return load_builder("tensorrt_rtx")


@pytest.fixture(scope="module")
def package() -> Package:
    return open_package(find_package("caformer_digits"))


def build(trt: Any, path: Path, input_size: int = SIZE, **changes: Any) -> bytes:
    """Build as the tests do unless they say otherwise."""
    arguments: dict[str, Any] = {"profile": PROFILE, "precision": "fp32"} | changes
    return build_plan(path, trt=trt, input_size=input_size, **arguments)


def refusal(trt: Any, path: Path, input_size: int = SIZE, **changes: Any) -> str:
    """Return the sentence with which a build is refused."""
    with pytest.raises(PlanError) as caught:
        build(trt, path, input_size, **changes)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def constant(name: str, *values: int, dtype: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    opset: int,
    names: tuple[str, str, str] = ("images", "logits", "embedding"),
    input_type: int = TensorProto.UINT8,
) -> Path:
    """Write a graph from uint8 (batch, 8, 8, 3) to logits (batch, 4), embedding (batch, 3).

    The nodes turn `pixels`, float32 (batch, 3, 8, 8), into `normed` of the same shape.
    """
    images, logits, embedding = names
    before = [
        helper.make_node("Cast", [images], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["pixels"], perm=[0, 3, 1, 2]),
    ]
    after = [
        helper.make_node("ReduceMean", ["normed", "sides"], [embedding], keepdims=0),
        helper.make_node("MatMul", [embedding, "weight"], [logits]),
    ]
    weight = numpy_helper.from_array(np.ones((3, 4), np.float32), "weight")
    graph = helper.make_graph(
        before + nodes + after,
        "test",
        [helper.make_tensor_value_info(images, input_type, ["batch", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info(embedding, TensorProto.FLOAT, ["batch", 3]),
        ],
        [*initializers, weight, constant("sides", 2, 3)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    path.write_bytes(model.SerializeToString())
    return path


def plain_graph(path: Path, **changes: Any) -> Path:
    """Write a graph without any trap in it."""
    return save_graph(path, [helper.make_node("Relu", ["pixels"], ["normed"])], [], 20, **changes)


def one_group_norm(path: Path, *, rank: int, opset: int = 21) -> Path:
    """Write a graph with a GroupNormalization of one group over (batch, 3, 8, 8) or (.., 64)."""
    flat = [] if rank == 4 else [helper.make_node("Reshape", ["pixels", "flat"], ["x"])]
    back = [] if rank == 4 else [helper.make_node("Reshape", ["y", "square"], ["normed"])]
    source, target = ("pixels", "normed") if rank == 4 else ("x", "y")
    norm = helper.make_node(
        "GroupNormalization", [source, "scale", "bias"], [target], name="norm1", num_groups=1
    )
    channels = 3 if opset >= 21 else 1
    initializers = [
        numpy_helper.from_array(np.ones(channels, np.float32), "scale"),
        numpy_helper.from_array(np.zeros(channels, np.float32), "bias"),
        constant("flat", 0, 3, -1),
        constant("square", 0, 3, SIZE, SIZE),
    ]
    return save_graph(path, [*flat, norm, *back], initializers, opset)


def served(architecture: Architecture, path: Path, precision: Precision = "fp32") -> Path:
    """Export a tiny network of ours the way every package is."""
    spec = InputSpec(size=architecture.input_size)
    model = ServedModel(cast_network(network(architecture), precision), spec).eval()
    export_onnx(model, spec.size, path)
    return path


@pytest.fixture(scope="module")
def half_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served(CAFORMER, tmp_path_factory.mktemp("half") / "model.onnx", "fp16")


# --- what is built


def test_a_package_gets_an_engine_of_its_graph_and_says_what_it_fits(
    trt: Any, package: Package, tmp_path: Path
) -> None:
    steps: list[str] = []
    with_plan = add_plan(package, tmp_path / "out", trt, max_batch_size=8, progress=steps.append)
    with_plan.check_files()
    manifest = with_plan.manifest
    assert with_plan.plan_path.stat().st_size > 100_000
    assert set(manifest.files) == set(package.manifest.files) | {PLAN}
    assert (tmp_path / "out/model.onnx").read_bytes() == package.model_path.read_bytes()
    assert manifest.plan is not None
    assert manifest.plan.model_dump() == {
        "module": "tensorrt_rtx",
        "version": trt.__version__,
        "compute_capability": None,
        "operating_system": operating_system(),
        "min_batch_size": 1,
        "opt_batch_size": 8,
        "max_batch_size": 8,
        "precision": "fp32",
        "onnx_sha256": sha256_file(package.model_path),
        "options": {"tf32": False, "optimization_level": 3},
    }
    unchanged = {"plan", "files", "tools"}
    assert manifest.model_dump(exclude=unchanged) == package.manifest.model_dump(exclude=unchanged)
    assert steps == ["building a TensorRT engine for batches of 1 to 8"]


def test_the_norms_of_our_one_group_graphs_are_read_right_and_build(
    trt: Any, tmp_path: Path
) -> None:
    path = served(POOLFORMERV2, tmp_path / "model.onnx")
    log = error_log(trt)
    builder = trt.Builder(log)
    parsed = parse_network(trt, builder, log, path, POOLFORMERV2.input_size)
    norms = [
        parsed.get_layer(index)
        for index in range(parsed.num_layers)
        if parsed.get_layer(index).type.name == "NORMALIZATION"
    ]
    # Two in each of six blocks; a tensor of one group and all values, normed over the values.
    groups = [norm for norm in norms if tuple(norm.get_input(0).shape)[1:2] == (1,)]
    assert len(groups) >= 12
    assert len(build(trt, path, POOLFORMERV2.input_size)) > 100_000


def test_half_precision_is_the_graphs(trt: Any, half_graph: Path) -> None:
    log = error_log(trt)
    builder = trt.Builder(log)
    parsed = parse_network(trt, builder, log, half_graph, CAFORMER.input_size)
    assert precision_of(parsed) == "fp16"
    assert build(trt, half_graph, CAFORMER.input_size, precision="fp16")


def test_bfloat16_graphs_build_too_at_the_opset_that_allows_them(trt: Any, tmp_path: Path) -> None:
    path = served(POOLFORMERV2, tmp_path / "model.onnx", "bf16")
    assert onnx.load(path).opset_import[0].version > 20
    assert build(trt, path, POOLFORMERV2.input_size, precision="bf16")


@pytest.mark.parametrize("mixer", ["conv", "identity", "random"])
def test_the_other_families_build(trt: Any, tmp_path: Path, mixer: Mixer) -> None:
    architecture = replace(ABLATED, name=f"tiny_{mixer}", mixers=(mixer,) * 4)
    path = served(architecture, tmp_path / "model.onnx")
    assert build(trt, path, architecture.input_size)


# --- the traps


def test_an_engine_is_not_called_fp16_when_its_graph_is_fp32(trt: Any, package: Package) -> None:
    sentence = refusal(trt, package.model_path, package.manifest.input.size, precision="fp16")
    assert "computes in fp32, so an engine of it is not fp16" in sentence
    assert "--precision fp16" in sentence


def test_an_engine_is_not_called_fp32_when_its_graph_is_fp16(trt: Any, half_graph: Path) -> None:
    sentence = refusal(trt, half_graph, CAFORMER.input_size, precision="fp32")
    assert "computes in fp16, so an engine of it is not fp32" in sentence


@pytest.mark.parametrize(
    ("kinds", "precision"),
    [
        (["FLOAT"] * 3, "fp32"),
        (["HALF"] * 9 + ["FLOAT"] * 2, "fp16"),
        (["BF16"] * 9, "bf16"),
        (["HALF"] * 2 + ["FLOAT"] * 9, "a mixture of FLOAT (9), HALF (2)"),
        (["HALF"] * 5 + ["BF16"], "a mixture of BF16 (1), HALF (5)"),
        (["INT8"] * 5, "a mixture of INT8 (5)"),
    ],
)
def test_precision_is_that_of_most_products_and_no_third_type(
    kinds: list[str], precision: str
) -> None:
    assert precision_of(FakeNetwork(kinds)) == precision


@pytest.mark.parametrize(("rank", "opset"), [(4, 21), (3, 21), (4, 18)])
def test_a_one_group_norm_that_is_read_as_a_norm_of_each_channel_is_caught(
    trt: Any, tmp_path: Path, rank: int, opset: int
) -> None:
    path = one_group_norm(tmp_path / "model.onnx", rank=rank, opset=opset)
    sentence = refusal(trt, path)
    assert "reads the norm norm1" in sentence
    assert f"over axes {list(range(2, rank))}" in sentence
    assert "export the graph again at opset 20" in sentence


def test_attention_in_float32_is_refused_before_it_kills_the_builder(
    trt: Any, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Reshape", ["pixels", "tokens"], ["x"]),
        helper.make_node("Attention", ["x", "x", "x"], ["y"], q_num_heads=1, kv_num_heads=1),
        helper.make_node("Reshape", ["y", "square"], ["normed"]),
    ]
    initializers = [constant("tokens", 0, 3, SIZE * SIZE), constant("square", 0, 3, SIZE, SIZE)]
    path = save_graph(tmp_path / "model.onnx", nodes, initializers, 23)
    sentence = refusal(trt, path)
    assert "an Attention node in float32" in sentence
    assert "opset 20" in sentence


@pytest.mark.parametrize("content", [b"", b"\x00\x01"])
def test_garbage_that_parses_as_an_empty_network_is_refused(
    trt: Any, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "is no ONNX graph" in refusal(trt, path)


def test_a_graph_that_cannot_be_read_is_told_with_the_node(trt: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("NoSuchOperator", ["pixels"], ["normed"], name="odd")]
    sentence = refusal(trt, save_graph(tmp_path / "model.onnx", nodes, [], 20))
    assert "cannot read" in sentence
    assert "odd (NoSuchOperator)" in sentence


@pytest.mark.parametrize("content", [None, b"no graph at all"])
def test_a_file_that_is_missing_or_no_graph_is_refused(
    trt: Any, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    assert f"tensorrt_rtx cannot read {path}" in refusal(trt, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("pixel", "logits", "embedding")}, "not one input"),
        ({"input_type": TensorProto.FLOAT}, "not one input"),
        ({"names": ("images", "logit", "embedding")}, "not float32 rows logits and embedding"),
    ],
    ids=["another name", "another type", "another output"],
)
def test_a_graph_with_other_ends_is_refused(
    trt: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(trt, plain_graph(tmp_path / "model.onnx", **changes))


def test_a_graph_of_another_input_size_is_refused(trt: Any, tmp_path: Path) -> None:
    sentence = refusal(trt, plain_graph(tmp_path / "model.onnx"), input_size=16)
    assert "(-1, 16, 16, 3)" in sentence
    assert "(-1, 8, 8, 3)" in sentence


def test_a_profile_that_is_none_is_refused(trt: Any, tmp_path: Path) -> None:
    path = plain_graph(tmp_path / "model.onnx")
    sentence = refusal(trt, path, profile=Profile(max_batch_size=4, opt_batch_size=8))
    assert "batches of 1 to 4 images, tuned for 8, are no profile" in sentence
    assert "MIN<=OPT<=MAX" in sentence


def test_an_optimization_level_that_would_be_clamped_is_refused(trt: Any, tmp_path: Path) -> None:
    path = plain_graph(tmp_path / "model.onnx")
    sentence = refusal(trt, path, options=BuildOptions(optimization_level=9))
    assert "9 is not within 0 to 5" in sentence


def test_the_builder_is_told_what_the_options_say(trt: Any) -> None:
    builder = trt.Builder(error_log(trt))
    flags, pool = trt.BuilderFlag, trt.MemoryPoolType.WORKSPACE
    exact = configure(trt, builder, BuildOptions())
    assert not exact.get_flag(flags.TF32), "float32 is float32 unless it is asked for otherwise"
    assert exact.get_flag(flags.REQUIRE_USER_ALLOCATION), "or CUDA graphs cannot capture it"
    assert exact.builder_optimization_level == 3
    options = BuildOptions(tf32=True, optimization_level=1, workspace_bytes=1 << 28)
    fast = configure(trt, builder, options)
    assert fast.get_flag(flags.TF32)
    assert fast.builder_optimization_level == 1
    assert fast.get_memory_pool_limit(pool) == 1 << 28
    assert options.as_dict() == {"tf32": True, "optimization_level": 1, "workspace_bytes": 1 << 28}


def test_a_build_that_fails_is_told_in_the_librarys_words(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network with no profile is one of the few that the stand-in fails at without dying.
    monkeypatch.setattr("export.tensorrt._add_profile", lambda *_: None)
    sentence = refusal(trt, plain_graph(tmp_path / "model.onnx"))
    assert "tensorrt_rtx cannot build an engine of" in sentence
    assert "optimization profile" in sentence


# --- progress, interruption


def test_progress_rises_from_nothing_to_the_whole(trt: Any, package: Package) -> None:
    shares: list[float] = []
    build(trt, package.model_path, package.manifest.input.size, share=shares.append)
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.1
    assert shares[-1] == 1.0
    assert len({round(share, 2) for share in shares}) >= 10


def test_nested_phases_add_up_to_one_share() -> None:
    phases = Phases()
    phases.start("whole", None, 2)
    phases.start("first half", "whole", 4)
    seen = []
    for step in range(4):
        phases.step("first half", step)
        seen.append(phases.share)
    phases.finish("first half")
    phases.step("whole", 0)
    phases.start("second half", "whole", 2)
    phases.step("second half", 0)
    seen.append(phases.share)
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.75]
    phases.step("nobody knows it", 0)
    assert phases.share == 0.75


@pytest.mark.parametrize(
    ("sent", "raised"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, SystemExit),
        (signal.SIGHUP, SystemExit),
    ],
)
def test_a_signal_ends_a_build_and_leaves_the_handler_as_it_was(
    trt: Any, package: Package, sent: signal.Signals, raised: type[BaseException]
) -> None:
    def interrupt(_: float) -> None:
        os.kill(os.getpid(), sent)

    with ending_by_exception():  # as the command line has it
        before = signal.getsignal(sent)
        with pytest.raises(raised):
            build(trt, package.model_path, package.manifest.input.size, share=interrupt)
        assert signal.getsignal(sent) is before


def test_what_the_caller_of_progress_raises_comes_out_of_the_build(
    trt: Any, package: Package
) -> None:
    def fail(_: float) -> None:
        raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        build(trt, package.model_path, package.manifest.input.size, share=fail)


def test_a_build_outside_the_main_thread_works(trt: Any, tmp_path: Path) -> None:
    built: list[bytes] = []
    path = plain_graph(tmp_path / "model.onnx")
    thread = threading.Thread(target=lambda: built.append(build(trt, path)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert built, "the build did not end within 60 s"


# --- the package, the caches


def test_a_failed_build_leaves_what_was_there(
    trt: Any, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    add_plan(package, out, trt, max_batch_size=2)
    before = sha256_file(out / PLAN)

    def fail(*_: Any, **__: Any) -> bytes:
        raise PlanError("no engine today")

    monkeypatch.setattr(plan_module, "build_plan", fail)
    with pytest.raises(PlanError, match="no engine today"):
        add_plan(package, out, trt, max_batch_size=4, overwrite=True)
    assert sha256_file(out / PLAN) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_engine_can_be_replaced_where_it_is(trt: Any, package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = add_plan(package, out, trt, max_batch_size=2)
    with pytest.raises(PackageError, match="exists already"):
        add_plan(first, out, trt, max_batch_size=4)
    second = add_plan(first, out, trt, max_batch_size=4, overwrite=True)
    assert second.manifest.plan is not None
    assert second.manifest.plan.max_batch_size == 4
    second.check_files()


def test_what_an_earlier_engine_has_proven_goes_with_it(
    trt: Any, package: Package, tmp_path: Path
) -> None:
    shown = package.manifest.verification.model_dump()
    proofs = tuple(
        BackendProof(**shown, backend=backend, precision="fp32", device="cuda:0")
        for backend in ("tensorrt", "torch")
    )
    proven = Package(package.path, package.manifest.model_copy(update={"proofs": proofs}))
    replaced = add_plan(proven, tmp_path / "out", trt, max_batch_size=2)
    assert [proof.backend for proof in replaced.manifest.proofs] == ["torch"]


def test_a_package_without_its_graph_or_with_a_damaged_one_is_refused(
    trt: Any, package: Package, tmp_path: Path
) -> None:
    files = {name: sha for name, sha in package.manifest.files.items() if name != "model.onnx"}
    bare = Package(package.path, package.manifest.model_copy(update={"files": files}))
    with pytest.raises(PackageError, match=r"holds no model\.onnx"):
        add_plan(bare, tmp_path / "out", trt)
    wrong = package.manifest.files | {"model.onnx": "0" * 64}
    damaged = Package(package.path, package.manifest.model_copy(update={"files": wrong}))
    with pytest.raises(PackageError, match="is not the file the manifest describes"):
        add_plan(damaged, tmp_path / "out", trt)
    assert not (tmp_path / "out").exists()


def test_the_cache_gives_an_engine_back_and_never_another_one(
    trt: Any, package: Package, tmp_path: Path
) -> None:
    cache, steps = tmp_path / "cache", list[str]()

    def add(name: str, **options: Any) -> Package:
        return add_plan(
            package, tmp_path / name, trt, cache=cache, progress=steps.append, **options
        )

    first = add("first", max_batch_size=2)
    again = add("again", max_batch_size=2)
    assert [step.split()[0] for step in steps] == ["building", "taking"]
    assert again.plan_path.read_bytes() == first.plan_path.read_bytes()
    add("larger", max_batch_size=4)
    add("tf32", max_batch_size=2, options=BuildOptions(tf32=True))
    assert [step.split()[0] for step in steps] == ["building", "taking", "building", "building"]
    kinds = sorted(path.suffix for path in cache.iterdir())
    assert kinds == [".cache", ".plan", ".plan", ".plan"], "engines, timings, nothing unfinished"


def test_the_key_of_an_engine_changes_with_everything_it_depends_on(
    trt: Any, package: Package, tmp_path: Path
) -> None:
    spec = add_plan(package, tmp_path / "out", trt, max_batch_size=2).manifest.plan
    assert spec is not None
    changes: list[dict[str, Any]] = [
        {"module": "tensorrt"},
        {"version": "11.4.0.1"},
        {"compute_capability": "9.0"},
        {"operating_system": "windows-amd64"},
        {"min_batch_size": 2},
        {"opt_batch_size": 1},
        {"max_batch_size": 4},
        {"precision": "fp16"},
        {"onnx_sha256": "0" * 64},
        {"options": {}},
    ]
    assert {field for change in changes for field in change} == set(spec.model_dump())
    keys = {spec.model_copy(update=change).key for change in changes}
    assert len(keys | {spec.key}) == len(changes) + 1


def test_timings_are_handed_to_the_builder_and_written_whole(trt: Any, tmp_path: Path) -> None:
    timings = tmp_path / "new/timings.cache"
    path = plain_graph(tmp_path / "model.onnx")
    build(trt, path, timing_cache=timings)
    first = timings.read_bytes()
    assert first
    build(trt, path, timing_cache=timings)
    timings.write_bytes(b"not a timing in it")
    build(trt, path, timing_cache=timings)
    assert timings.read_bytes() == first, "a file that is none is replaced by a good one"
    assert [file.name for file in timings.parent.iterdir()] == ["timings.cache"]


# --- where it can be built


def test_tensorrt_is_refused_without_a_gpu_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find_none() -> Gpu:
        raise NoGpuError("there is none here")

    monkeypatch.setattr(plan_module, "find_gpu", find_none)
    monkeypatch.setattr(plan_module, "import_tensorrt", lambda name: pytest.fail("imported"))
    with pytest.raises(PlanError, match="on the GPU it is for, and there is none here"):
        load_builder("tensorrt")


def test_a_missing_tensorrt_is_told_with_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "find_gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(PlanError, match="tensorrt is not installed") as caught:
        load_builder("tensorrt")
    assert "https://pypi.nvidia.com" in str(caught.value)


def test_the_engine_of_tensorrt_names_the_gpu_it_was_built_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "find_gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    assert plan_module.compute_capability_for("tensorrt") == "9.0"
    assert plan_module.compute_capability_for("tensorrt_rtx") is None


def test_a_manifest_without_a_plan_is_read_as_before(package: Package) -> None:
    stated = json.loads((package.path / "manifest.json").read_text())
    assert stated.pop("plan", None) is None
    assert Manifest.model_validate(stated).plan is None
    with pytest.raises(PackageError, match=r"holds no model\.plan, which the tensorrt backend"):
        _ = package.plan_path


# --- doubles


class FakeNetwork:
    """As much of a parsed network as its types are read from."""

    def __init__(self, kinds: list[str]) -> None:
        self._kinds = kinds
        self.num_layers = len(kinds)

    def get_layer(self, index: int) -> Any:
        dtype = Named(self._kinds[index])
        tensor = type("Tensor", (), {"dtype": dtype})()
        layer = type("Layer", (), {"type": Named("MATRIX_MULTIPLY")})()
        layer.get_output = lambda _: tensor
        return layer


class Named:
    def __init__(self, name: str) -> None:
        self.name = name
