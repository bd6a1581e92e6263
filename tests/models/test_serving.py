"""The served model: uint8 pixels in, what the network says of the normalised image out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from models.build import load_served_model
from models.checkpoints import CheckpointError
from models.package import (
    WEIGHTS,
    ArchitectureSpec,
    InputSpec,
    Manifest,
    Package,
    PackageError,
)
from models.serving import ServedModel
from models.variants import Architecture
from tests.models import tiny
from tests.reference import timm_pixels, timm_transform

SPEC = InputSpec(size=32)


class Seen(nn.Module):
    """A network that answers with its input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x


def pixels(count: int = 5, size: int = 32, seed: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=draw, dtype=torch.uint8)


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel(tiny.network(tiny.CAFORMER), SPEC).eval()


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        InputSpec(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        InputSpec(size=32, mean=(0.0, 0.1, 0.9), std=(1.0, 0.3, 0.05)),
    ],
)
def test_every_pixel_value_is_divided_shifted_and_scaled_channel_by_channel(
    spec: InputSpec,
) -> None:
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)

    _, normalised = ServedModel(Seen(), spec)(ramp)

    exact = (np.asarray(ramp, np.float64) / 255 - spec.mean) / spec.std
    # Relative to 1 / std, the span that rounding of float32 happens in.
    assert np.abs((normalised.numpy() - exact) * spec.std).max() < 2.4e-7


def test_the_network_sees_what_timms_transform_gives() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    image = Image.fromarray(noise)

    cut_out = torch.from_numpy(timm_pixels(image, 32))
    _, normalised = ServedModel(Seen(), SPEC)(cut_out[None])

    assert cut_out.shape == (32, 32, 3)
    difference = normalised[0].permute(2, 0, 1) - timm_transform(32)(image)
    assert difference.abs().max() < 1e-6


def test_logits_and_embedding_are_float32_of_the_promised_shapes(served: ServedModel) -> None:
    logits, embedding = tiny.outputs(served, pixels(count=3))

    assert (logits.dtype, embedding.dtype) == (torch.float32, torch.float32)
    assert logits.shape == (3, tiny.CLASSES)
    assert embedding.shape == (3, 64)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float16, 0.05), (torch.float64, 1e-4)]
)
def test_a_model_cast_to_another_precision_still_answers_in_float32(
    served: ServedModel, dtype: torch.dtype, tolerance: float
) -> None:
    cast = ServedModel(tiny.network(tiny.CAFORMER), SPEC).to(dtype).eval()

    logits, embedding = tiny.outputs(cast, pixels())
    reference, _ = tiny.outputs(served, pixels())

    assert (logits.dtype, embedding.dtype) == (torch.float32, torch.float32)
    assert 0 < (logits - reference).abs().max() < tolerance


def test_the_outputs_are_the_networks_for_the_normalised_image(served: ServedModel) -> None:
    mean, std = torch.tensor(SPEC.mean), torch.tensor(SPEC.std)
    normalised = (pixels() / 255 - mean) / std

    expected = tiny.outputs(served.network, normalised)

    for ours, theirs in zip(tiny.outputs(served, pixels()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", [tiny.CAFORMER, tiny.POOLFORMERV2], ids=lambda a: a.name)
def test_an_image_gets_the_same_answer_alone_and_in_any_batch(architecture: Architecture) -> None:
    served = ServedModel(tiny.network(architecture), SPEC).eval()
    images = pixels()
    together = tiny.outputs(served, images)

    assert (together[0][0] - together[0][1]).abs().max() > 0.1  # the images do differ
    for index in range(len(images)):
        alone = tiny.outputs(served, images[index : index + 1])
        beside_white = tiny.outputs(
            served, torch.stack([torch.full_like(images[0], 255), images[index]])
        )
        for output in range(2):
            expected = together[output][index]
            torch.testing.assert_close(alone[output][0], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(beside_white[output][1], expected, rtol=0, atol=1e-5)


def package(folder: Path, architecture: Architecture, **fields: Any) -> Package:
    """Return a package of which only what the torch backend reads is there."""
    given: dict[str, Any] = {
        "architecture": ArchitectureSpec(**asdict(architecture)),
        "classes": tiny.CLASSES,
        "input": SPEC,
        "head_norm_eps": 1e-6,
        "files": {WEIGHTS: "0" * 64},
    }
    return Package(folder, Manifest.model_construct(**given | fields))


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_package_gives_its_weights_and_epsilon_to_the_served_model(
    eps: float, tmp_path: Path
) -> None:
    network = tiny.network(tiny.CAFORMER)
    network.get_submodule("head.fc.norm").eps = eps  # type: ignore[assignment]
    save_file(network.state_dict(), tmp_path / WEIGHTS)

    loaded = load_served_model(package(tmp_path, tiny.CAFORMER, head_norm_eps=eps))

    assert loaded.get_submodule("network.head.fc.norm").eps == eps
    assert not loaded.training
    expected = tiny.outputs(ServedModel(network, SPEC).eval(), pixels())
    for ours, theirs in zip(tiny.outputs(loaded, pixels()), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_package_whose_weights_are_of_another_network_is_refused(tmp_path: Path) -> None:
    save_file(tiny.network(tiny.POOLFORMERV2).state_dict(), tmp_path / WEIGHTS)

    with pytest.raises(CheckpointError, match=r"^the checkpoint lacks stages\.0\.blocks\.0"):
        load_served_model(package(tmp_path, tiny.CAFORMER))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no checkpoint file"), (b"", "is empty"), (b"damaged", "cannot be read")],
)
def test_a_package_whose_weights_are_damaged_is_refused(
    content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / WEIGHTS).write_bytes(content)

    with pytest.raises(CheckpointError, match=sentence):
        load_served_model(package(tmp_path, tiny.CAFORMER))


def test_a_package_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"holds no weights\.safetensors"):
        load_served_model(package(tmp_path, tiny.CAFORMER, files={}))
