"""Every family at its real size: exported, and proven on every backend that runs without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from app.cli import main
from models.metaformer import MetaFormer
from models.package import open_package
from models.variants import find_variant
from tests.reference import randomise
from tests.triton.server import Repository, triton_server

SMALLEST = ("identityformer_s12", "randformer_s12", "poolformerv2_s12", "convformer_s18",
            "caformer_s18")  # fmt: skip
CLASSES = 1000


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("variant", SMALLEST)
def test_each_family_is_the_same_on_onnxruntime_torch_and_triton(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, _ = find_variant(variant)
    weights, out = tmp_path / "weights.safetensors", tmp_path / variant
    save_file(randomise(MetaFormer(architecture, CLASSES), 3).state_dict(), weights)
    assert run("export", variant, "--checkpoint", weights, "--out", out) == 0
    package = open_package(out)
    exported = package.manifest.verification
    assert exported.max_abs_logit_difference <= exported.logit_tolerance == 1e-4
    assert exported.batch_dependence == 0
    repository = Repository(tmp_path / "models")
    repository.add(variant, package)
    with triton_server(tmp_path, repository) as server:
        backends = ("--backends", "onnxruntime,torch,triton", "--triton-url", server.url)
        assert run("verify", out, *backends) == 0
    proofs = {proof.backend: proof for proof in open_package(out).manifest.proofs}
    assert list(proofs) == ["onnxruntime", "torch", "triton"]
    for proof in proofs.values():
        assert proof.precision == "fp32"
        assert 0 < proof.max_abs_logit_difference <= proof.logit_tolerance == 1e-4
        assert proof.max_embedding_cosine_distance <= 1e-6
        assert proof.top1_agreement == 1.0
    # torch chooses its kernels by the size of a batch; a graph computes image by image.
    assert proofs["onnxruntime"].batch_dependence == proofs["triton"].batch_dependence == 0
    assert "Triton 2." in proofs["triton"].runtime
    assert "triton       fp32" in capsys.readouterr().out


def test_a_package_without_weights_is_proven_against_its_golden_outputs(tmp_path: Path) -> None:
    variant = "poolformerv2_s12"
    architecture, _ = find_variant(variant)
    weights, out = tmp_path / "weights.safetensors", tmp_path / variant
    save_file(randomise(MetaFormer(architecture, 7), 3).state_dict(), weights)
    assert run("export", variant, "--checkpoint", weights, "--out", out, "--no-weights") == 0
    assert run("verify", out) == 0
