"""The networks compute what timm computes, from the same weights, read from files.

5e-5 absolute on logits and embeddings of standard deviation 1: the bound architectures.md sets;
the differences measured when this was written are below 5e-6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.build import build_network
from models.checkpoints import load_checkpoint
from models.layers import Attention, Pooling, SepConv
from models.metaformer import MetaFormer
from models.variants import ARCHITECTURES
from tests.models import tiny
from tests.reference import (
    from_official_layout,
    randformer_outputs,
    randomise,
    timm_model,
    timm_outputs,
    to_official_layout,
)

TOLERANCE = 5e-5

CASES = [
    ("caformer_s18", 224),
    ("caformer_s18", 384),
    ("caformer_m36", 224),
    ("convformer_s18", 224),
    ("poolformerv2_s12", 224),
    ("identityformer_s12", 224),
]


@dataclass(frozen=True)
class Reference:
    name: str
    model: nn.Module
    images: Tensor


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def reference(request: pytest.FixtureRequest) -> Reference:
    name, size = request.param
    model = randomise(timm_model(name), seed=1)
    return Reference(name, model, tiny.images(count=1 if size > 224 else 2, size=size))


def assert_same_outputs(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    logits, embedding = theirs
    # The bound means something only for outputs of this size that differ between classes.
    assert 0.5 < logits.std() < 2
    assert 0.5 < embedding.std() < 2
    torch.testing.assert_close(ours[0], logits.to(ours[0].dtype), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours[1], embedding.to(ours[1].dtype), rtol=0, atol=TOLERANCE)


def test_outputs_equal_timms_from_a_timm_safetensors_file(
    reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(reference.model.state_dict(), path)

    checkpoint = load_checkpoint(path)
    network = build_network(ARCHITECTURES[reference.name], checkpoint)

    assert (checkpoint.layout, checkpoint.classes) == ("timm", 1000)
    assert_same_outputs(
        tiny.outputs(network, reference.images), timm_outputs(reference.model, reference.images)
    )


def test_outputs_equal_timms_at_the_official_epsilon_from_an_official_pth_file(
    reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / f"{reference.name}.pth"
    torch.save(to_official_layout(reference.model.state_dict()), path)

    checkpoint = load_checkpoint(path)
    network = build_network(ARCHITECTURES[reference.name], checkpoint)

    assert (checkpoint.layout, checkpoint.classes) == ("official", 1000)
    assert_same_outputs(
        tiny.outputs(network, reference.images),
        timm_outputs(reference.model, reference.images, head_norm_eps=1e-5),
    )


def test_the_official_layout_of_these_tests_is_the_one_timm_reads(reference: Reference) -> None:
    state = reference.model.state_dict()

    back = from_official_layout(to_official_layout(state), reference.model)

    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(("layout", "eps"), [("timm", 1e-6), ("official", 1e-5)])
def test_the_head_norm_keeps_the_epsilon_that_belongs_to_the_layout(
    layout: str, eps: float, tmp_path: Path
) -> None:
    # With a hidden vector this small the epsilons are worlds apart.
    model = tiny.timm_twin()
    with torch.no_grad():
        model.get_parameter("head.fc.fc1.weight").mul_(0.05)
        model.get_parameter("head.fc.fc1.bias").mul_(0.05)
    state = model.state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state if layout == "timm" else to_official_layout(state), path)

    checkpoint = load_checkpoint(path)
    ours, _ = tiny.outputs(build_network(tiny.CAFORMER, checkpoint), tiny.images())

    right, _ = timm_outputs(model, tiny.images(), head_norm_eps=eps)
    wrong, _ = timm_outputs(model, tiny.images(), head_norm_eps=1.1e-5 - eps)
    assert checkpoint.head_norm_eps == eps
    assert (ours - right).abs().max() < TOLERANCE
    assert (ours - wrong).abs().max() > 100 * TOLERANCE


def test_our_weights_give_timm_the_same_logits_after_a_round_trip_through_a_file(
    tmp_path: Path,
) -> None:
    network = tiny.network(tiny.CAFORMER)
    save_file(network.state_dict(), tmp_path / "ours.safetensors")

    theirs = tiny.timm_twin(seed=2)
    state = {
        key: tensor[..., None, None] if theirs.state_dict()[key].ndim == tensor.ndim + 2 else tensor
        for key, tensor in load_file(tmp_path / "ours.safetensors").items()
    }
    theirs.load_state_dict(state, strict=True)

    assert sum(tensor.ndim == 4 for tensor in state.values()) == 4 + 3 + 3 * 4
    assert_same_outputs(tiny.outputs(network, tiny.images()), timm_outputs(theirs, tiny.images()))


def test_randformer_computes_its_formulas(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["randformer_s12"]
    network = randomise(MetaFormer(architecture, 1000), seed=3).eval()
    state = network.state_dict()
    assert_same_outputs(
        tiny.outputs(network, tiny.images(size=224)),
        randformer_outputs(state, architecture.depths, tiny.images(size=224)),
    )

    torch.save(to_official_layout(state), tmp_path / "randformer_s12.pth")
    loaded = build_network(architecture, load_checkpoint(tmp_path / "randformer_s12.pth"))
    assert torch.equal(
        tiny.outputs(loaded, tiny.images(size=224))[0],
        tiny.outputs(network, tiny.images(size=224))[0],
    )


def test_a_random_matrix_starts_with_rows_that_sum_to_one_and_is_never_trained() -> None:
    architecture = replace(tiny.POOLFORMERV2, mixers=("identity", "identity", "random", "random"))
    network = MetaFormer(architecture, 2)

    matrices = {k: v for k, v in network.state_dict().items() if k.endswith("random_matrix")}

    assert [tuple(matrix.shape) for matrix in matrices.values()] == [(4, 4), (4, 4), (1, 1)]
    for matrix in matrices.values():
        torch.testing.assert_close(matrix.sum(-1), torch.ones(len(matrix)))
    assert not matrices.keys() & dict(network.named_parameters()).keys()


def mix(mixer: nn.Module, x: Tensor) -> Tensor:
    """Run a mixer, its weights drawn anew, without gradients."""
    with torch.inference_mode():
        mixed: Tensor = randomise(mixer, seed=5)(x)
    return mixed


def test_pooling_is_the_mean_of_the_neighbours_there_are_minus_the_pixel() -> None:
    x = torch.randn(2, 5, 4, 3)

    mixed = mix(Pooling(), x)

    for row, column in [(0, 0), (0, 2), (2, 1), (4, 3)]:
        window = x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        expected = window.mean((1, 2)) - x[:, row, column]
        torch.testing.assert_close(mixed[:, row, column], expected)


def test_attention_is_softmax_of_scaled_products_head_by_head() -> None:
    x = torch.randn(1, 2, 3, 16)
    attention = Attention(16, head_dim=8, bias=False)

    mixed = mix(attention, x)

    tokens = x.reshape(6, 16)
    query, key, value = (tokens @ attention.qkv.weight.T).detach().chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = (query[:, head] @ key[:, head].T / 8**0.5).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ value[:, head])
    expected = torch.cat(heads, dim=-1) @ attention.proj.weight.detach().T
    torch.testing.assert_close(mixed.reshape(6, 16), expected, rtol=0, atol=1e-5)


def test_sepconv_is_pointwise_star_relu_depthwise_7x7_pointwise() -> None:
    x = torch.randn(1, 9, 8, 4)
    sepconv = SepConv(4, "star_relu", bias=False)

    mixed = mix(sepconv, x)

    weights = {key: tensor.double() for key, tensor in sepconv.state_dict().items()}
    hidden = x.double() @ weights["pwconv1.weight"].T
    hidden = weights["act1.scale"] * hidden.clamp(min=0) ** 2 + weights["act1.bias"]
    padded = torch.zeros(1, 15, 14, 8, dtype=torch.float64)
    padded[:, 3:12, 3:11] = hidden  # zeros stand where the activation is not
    spread = torch.zeros_like(hidden)
    for row in range(7):
        for column in range(7):
            window = padded[:, row : row + 9, column : column + 8]
            spread += window * weights["dwconv.weight"][:, 0, row, column]
    expected = (spread @ weights["pwconv2.weight"].T).float()
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["poolformerv2_s12", "identityformer_s12", "convformer_s18"])
@pytest.mark.parametrize("size", [33, 231])
def test_sizes_that_no_stride_divides_run_as_in_timm(name: str, size: int, tmp_path: Path) -> None:
    model = randomise(timm_model(name, classes=10), seed=4)
    checkpoint = tiny.save_and_load(model.state_dict(), tmp_path)
    network = build_network(ARCHITECTURES[name], checkpoint)

    images = tiny.images(size=size)

    assert_same_outputs(tiny.outputs(network, images), timm_outputs(model, images))
