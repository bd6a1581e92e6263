"""The reference implementations as test oracles: timm, and plain formulas in double precision.

timm is imported here and nowhere else. Nothing in this file uses code of `models/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn


@contextmanager
def _no_fake_kernels() -> Iterator[None]:
    """Let torchvision import beside a torch its compiled operators were not built for.

    torchvision's common wheel carries CUDA operators, which the CPU torch cannot load; describing
    them to the tracer then fails. Nothing here uses them.
    """
    register_fake = torch.library.register_fake

    def ignore(*_: object, **__: object) -> Callable[[Any], Any]:
        return lambda function: function

    torch.library.register_fake = ignore
    try:
        yield
    finally:
        torch.library.register_fake = register_fake


with _no_fake_kernels():  # timm imports torchvision
    import timm
    from timm.data.transforms_factory import create_transform
    from timm.models import metaformer as timm_metaformer
    from timm.models import save_for_hf

Model = TypeVar("Model", bound=nn.Module)

save_as_timm = save_for_hf
"""What `timm.models.push_to_hf_hub` writes before it pushes."""

POINTWISE = ("pwconv1", "pwconv2", "fc1", "fc2")


def timm_model(name: str, classes: int = 1000) -> nn.Module:
    """Return timm's model of this name, freshly initialised, for evaluation.

    IdentityFormer, which timm has no name for, is built of timm's class.
    """
    if name == "identityformer_s12":
        model: nn.Module = timm_metaformer.MetaFormer(
            num_classes=classes,
            depths=(2, 2, 6, 2),
            dims=(64, 128, 320, 512),
            token_mixers=nn.Identity,
            norm_layers=timm_metaformer.GroupNorm1NoBias,
            use_mlp_head=False,
        )
    else:
        model = timm.create_model(name, num_classes=classes)
    return model.eval()


def timm_caformer(depths: Sequence[int], dims: Sequence[int], classes: int) -> nn.Module:
    """Return a CAFormer of any size, built of timm's blocks; heads are 32 wide."""
    conv, attention = timm_metaformer.SepConv, timm_metaformer.Attention
    norm_2d, norm = timm_metaformer.LayerNorm2dNoBias, timm_metaformer.LayerNormNoBias
    model: nn.Module = timm_metaformer.MetaFormer(
        num_classes=classes,
        depths=tuple(depths),
        dims=tuple(dims),
        token_mixers=[conv, conv, attention, attention],
        norm_layers=[norm_2d, norm_2d, norm, norm],
    )
    return model.eval()


def timm_catalogue(families: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what timm's registry says of every published checkpoint of some families."""
    registry: Any = timm.models
    names = [name for family in families for name in timm.list_pretrained(f"{family}_*")]
    return {name: registry.get_pretrained_cfg(name).to_dict() for name in names}


@torch.inference_mode()
def timm_outputs(
    model: nn.Module, images: Tensor, head_norm_eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return logits and embedding of a timm model for normalised images (B, H, W, 3).

    timm runs the norm inside an MLP head with 1e-6, the official code with 1e-5.
    """
    network: Any = model
    for name, module in network.head.named_modules():
        if name == "fc.norm":
            module.eps = head_norm_eps
    features = network.forward_features(images.permute(0, 3, 1, 2))
    return network.forward_head(features), network.forward_head(features, pre_logits=True)


@torch.no_grad()
def randomise(model: Model, seed: int) -> Model:
    """Move every parameter off its initial value; logits keep a standard deviation near 1.

    Matrices and convolutions are drawn with unit gain, so that no branch vanishes beside its
    skip path. Two networks whose parameters have the same names, shapes and order draw the same.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.copy_(normal / fan_in**0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * normal)
        else:  # weights of norms, scales of residuals and StarReLU
            parameter.copy_(1.0 + 0.2 * normal.clamp(-3, 3))
    return model


def to_official_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name and shape timm's state dict as sail-sg/metaformer saves it."""
    official: dict[str, Tensor] = {}
    for key, tensor in state.items():
        parts = key.split(".")
        match parts:
            case ["stem", "norm", kind]:
                name = f"downsample_layers.0.post_norm.{kind}"
            case ["stem", "conv", kind]:
                name = f"downsample_layers.0.conv.{kind}"
            case ["stages", stage, "downsample", "norm", kind]:
                name = f"downsample_layers.{stage}.pre_norm.{kind}"
            case ["stages", stage, "downsample", "conv", kind]:
                name = f"downsample_layers.{stage}.conv.{kind}"
            case ["stages", stage, "blocks", block, *rest]:
                name = ".".join(["stages", stage, block, *rest])
            case ["head", "norm", kind]:
                name = f"norm.{kind}"
            case ["head", "fc", *rest]:
                name = ".".join(["head", *rest])
            case _:
                raise AssertionError(f"timm has a key this test does not know: {key}")
        if parts[-2] in POINTWISE and tensor.ndim == 4:
            assert tensor.shape[2:] == (1, 1)
            tensor = tensor[:, :, 0, 0]
        official[name] = tensor.contiguous()
    return official


def from_official_layout(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Name and shape an official state dict for a timm model, by timm's own rules."""
    rules: Any = timm_metaformer
    renamed: dict[str, Tensor] = rules.checkpoint_filter_fn(dict(state), model)
    return renamed


@torch.inference_mode()
def randformer_outputs(
    state: Mapping[str, Tensor], depths: Sequence[int], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute RandFormer from its formulas, in double precision, channels first.

    Args:
        state: the weights under timm's names; a block without `random_matrix` mixes nothing.
        depths: blocks in each stage.
        images: normalised, (B, H, W, 3).

    Returns:
        Logits (B, classes) and embedding (B, dim).
    """
    weights = {key: tensor.double() for key, tensor in state.items()}
    conv = nn.functional.conv2d

    def norm(x: Tensor, axes: tuple[int, ...], key: str) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        variance = (centred * centred).mean(axes, keepdim=True)
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        scaled = centred / (variance + 1e-6).sqrt() * weights[f"{key}.weight"].view(per_channel)
        bias = weights.get(f"{key}.bias")
        return scaled if bias is None else scaled + bias.view(per_channel)

    def mix(x: Tensor, block: str) -> Tensor:
        matrix = weights.get(f"{block}.token_mixer.random_matrix")
        if matrix is None:
            return x
        return torch.einsum("mn,bcn->bcm", matrix, x.flatten(2)).reshape(x.shape)

    def mlp(x: Tensor, block: str) -> Tensor:
        hidden = torch.einsum("oc,bchw->bohw", weights[f"{block}.mlp.fc1.weight"], x)
        scale, bias = weights[f"{block}.mlp.act.scale"], weights[f"{block}.mlp.act.bias"]
        hidden = scale * hidden.clamp(min=0) ** 2 + bias
        return torch.einsum("oc,bchw->bohw", weights[f"{block}.mlp.fc2.weight"], hidden)

    def skip(x: Tensor, key: str) -> Tensor:
        scale = weights.get(f"{key}.scale")
        return x if scale is None else x * scale.view(-1, 1, 1)

    x = images.double().permute(0, 3, 1, 2)
    x = conv(x, weights["stem.conv.weight"], weights["stem.conv.bias"], stride=4, padding=2)
    x = norm(x, (1,), "stem.norm")
    for stage, depth in enumerate(depths):
        if stage:
            down = f"stages.{stage}.downsample"
            x = norm(x, (1,), f"{down}.norm")
            kernel, bias = weights[f"{down}.conv.weight"], weights[f"{down}.conv.bias"]
            x = conv(x, kernel, bias, stride=2, padding=1)
        for index in range(depth):
            block = f"stages.{stage}.blocks.{index}"
            mixed = mix(norm(x, (1, 2, 3), f"{block}.norm1"), block)
            x = skip(x, f"{block}.res_scale1") + mixed
            widened = mlp(norm(x, (1, 2, 3), f"{block}.norm2"), block)
            x = skip(x, f"{block}.res_scale2") + widened
    embedding = norm(x.mean((2, 3)), (1,), "head.norm")
    return embedding @ weights["head.fc.weight"].T + weights["head.fc.bias"], embedding


def timm_transform(
    size: int, crop_pct: float = 1.0, interpolation: str = "bicubic"
) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform: an RGB image -> normalised float32 (3, size, size)."""
    transform: Callable[[Image.Image], Tensor] = create_transform(
        input_size=(3, size, size),
        is_training=False,
        crop_pct=crop_pct,
        interpolation=interpolation,
    )
    return transform


def timm_pixels(
    image: Image.Image, size: int, crop_pct: float = 1.0, interpolation: str = "bicubic"
) -> NDArray[np.uint8]:
    """Return what timm's evaluation transform cuts out: uint8 (size, size, 3), not normalised."""
    transform = create_transform(
        input_size=(3, size, size),
        is_training=False,
        crop_pct=crop_pct,
        interpolation=interpolation,
        normalize=False,
    )
    pixels: Tensor = transform(image)
    assert pixels.dtype == torch.uint8
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
