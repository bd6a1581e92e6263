"""A checkpoint file becomes a checked state dict: read safely, unwrapped, renamed, fitted.

Three layouts are known: timm's (which is ours), the official one of sail-sg/metaformer, and
PoolFormer v1, which is another network and refused. Nothing is ever unpickled but tensors.
"""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models.package import sha256_file

Layout = Literal["timm", "official"]

# timm's order of preference; a moving average is what was evaluated where there is one.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS_WITHOUT_EMA = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")

# Official key -> our key. The first rule that matches a key rewrites it, once: both layouts know
# `head.norm`, with different meanings.
RENAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^downsample_layers\.0\.conv\.(weight|bias)$", r"stem.conv.\1"),
        (r"^downsample_layers\.0\.post_norm\.(weight|bias)$", r"stem.norm.\1"),
        (r"^downsample_layers\.([123])\.pre_norm\.(weight|bias)$", r"stages.\1.downsample.norm.\2"),
        (r"^downsample_layers\.([123])\.conv\.(weight|bias)$", r"stages.\1.downsample.conv.\2"),
        (r"^stages\.([0-3])\.(\d+)\.(.+)$", r"stages.\1.blocks.\2.\3"),
        (r"^norm\.(weight|bias)$", r"head.norm.\1"),
        (r"^head\.(fc1|fc2|norm)\.(weight|bias)$", r"head.fc.\1.\2"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
)

# The official code trains the head's norm with torch's default, timm runs it with 1e-6.
# Our own files state it.
EPS_KEY = "head_norm_eps"
HEAD_NORM_EPS: dict[Layout, float] = {"official": 1e-5, "timm": 1e-6}


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence that says why."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, under our names.

    Attributes:
        state: key -> tensor, named as in `MetaFormer.state_dict()`, shapes not yet checked.
        layout: how the file named them.
        classes: outputs of the classifier.
        head_norm_eps: epsilon that belongs to the layout.
        sha256: of the file.
    """

    state: dict[str, Tensor]
    layout: Layout
    classes: int
    head_norm_eps: float
    sha256: str


def load_checkpoint(path: Path, *, ema: bool = True) -> Checkpoint:
    """Read a `.safetensors`, `.pth`, `.pt` or `.bin` file.

    Args:
        path: the file.
        ema: prefer the moving average where the file holds both.

    Raises:
        CheckpointError: the file cannot be read safely, or is no MetaFormer.
    """
    state = unwrap(_read(path), ema=ema)
    layout = detect_layout(state)
    if layout == "official":
        state = {_rename(key): tensor for key, tensor in state.items()}
    classifier = state.get("head.fc.fc2.weight", state.get("head.fc.weight"))
    if classifier is None:
        raise CheckpointError(
            f"{path.name} has no classifier (neither head.fc.fc2.weight nor head.fc.weight)"
        )
    if not classifier.ndim or not classifier.shape[0]:
        raise CheckpointError(
            f"the classifier of {path.name} has shape {list(classifier.shape)}, which is no classes"
        )
    return Checkpoint(
        state=state,
        layout=layout,
        classes=int(classifier.shape[0]),
        head_norm_eps=_stated_eps(path) or HEAD_NORM_EPS[layout],
        sha256=sha256_file(path),
    )


def save_weights(state: dict[str, Tensor], head_norm_eps: float, path: Path) -> None:
    """Write a `.safetensors` file in our layout, with the epsilon that belongs to the weights.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, path, metadata={EPS_KEY: repr(head_norm_eps)})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def _stated_eps(path: Path) -> float | None:
    """Return the epsilon that `save_weights` wrote into a file, None where it is another's."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stated = (file.metadata() or {}).get(EPS_KEY)
    if stated is None:
        return None
    try:
        eps = float(stated)
    except ValueError:
        eps = 0.0
    if not 0 < eps < 1:
        raise CheckpointError(f"{path.name} states {stated[:40]!r} as head_norm_eps")
    return eps


def unwrap(content: object, *, ema: bool = True) -> dict[str, Tensor]:
    """Take the state dict out of what a training script saved.

    Raises:
        CheckpointError: there is no mapping of names to tensors in it.
    """
    if isinstance(content, Mapping):
        inner = [content.get(wrapper) for wrapper in (WRAPPERS if ema else WRAPPERS_WITHOUT_EMA)]
        wrapped = [one for one in inner if isinstance(one, Mapping)]
        # An empty average is what a trainer saves that kept none.
        content = next(filter(None, wrapped), wrapped[0] if wrapped else content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            "the file holds no state dict, that is no mapping of names to tensors"
        )
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not key.isprintable():
            raise CheckpointError(f"a key of the state dict is no name: {_shorten(ascii(key))}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r} is of type {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise CheckpointError(f"{key!r} is a sparse, nested or meta tensor, not a plain one")
        name = key
        while name.startswith(PREFIXES):  # data parallel and compiled, in either order
            name = name.partition(".")[2]
        if name in state:
            raise CheckpointError(f"{name!r} is there twice, with a prefix and without")
        state[name] = value
    return state


def detect_layout(state: Mapping[str, Tensor]) -> Layout:
    """Tell who named the keys.

    Raises:
        CheckpointError: PoolFormer v1, or nothing we know.
    """
    # Never decided on `head.norm.weight`: both layouts have it, with different meanings.
    if _is_poolformer_v1(state):
        raise CheckpointError(
            "this is a PoolFormer v1 checkpoint, another network than PoolFormerV2; "
            "use a poolformerv2 checkpoint"
        )
    if "stem.conv.weight" in state:
        return "timm"
    if "downsample_layers.0.conv.weight" in state:
        return "official"
    raise CheckpointError(
        f"these are no MetaFormer weights; the file starts with {', '.join(sorted(state)[:5])}"
    )


def _is_poolformer_v1(state: Mapping[str, Tensor]) -> bool:
    if "stem.conv.weight" in state:  # timm: no norm after the stem, but layer scales
        return "stem.norm.weight" not in state and "stages.0.blocks.0.layer_scale1.scale" in state
    return "network.0.0.mlp.fc1.weight" in state or "patch_embed.proj.weight" in state


def fit_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check a state dict against the network's own and give every tensor its shape.

    The one reshape allowed is that of a pointwise layer, stored (out, in) here and
    (out, in, 1, 1) by others. Tensors come back as contiguous float32.

    Raises:
        CheckpointError: a key is missing, extra or misshapen, or a value is not finite.
    """
    missing = [key for key in expected if key not in state]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}")
    extra = [key for key in state if key not in expected]
    if extra:
        raise CheckpointError(f"the checkpoint holds keys the network lacks: {_some(extra)}")
    return {key: _fit(key, state[key], expected[key]) for key in expected}


def _fit(key: str, tensor: Tensor, expected: Tensor) -> Tensor:
    shape, wanted = tuple(tensor.shape), tuple(expected.shape)
    is_pointwise = len(wanted) == 2 and shape == (*wanted, 1, 1)
    if shape != wanted and not is_pointwise:
        raise CheckpointError(f"{key} has shape {list(shape)}, the network wants {list(wanted)}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{key} is {tensor.dtype}, the network wants floating point")
    fitted = tensor.detach().reshape(wanted).to("cpu", torch.float32).contiguous()
    if not torch.isfinite(fitted).all():
        raise CheckpointError(f"{key} holds values that are not finite")
    return fitted


def _some(keys: list[str], shown: int = 3) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more


def _shorten(text: str) -> str:
    return textwrap.shorten(text, width=160, placeholder=" ...")


def _rename(key: str) -> str:
    for pattern, replacement in RENAMES:
        if pattern.match(key):
            return pattern.sub(replacement, key)
    return key  # left for `fit_state` to name as extra


def _read(path: Path) -> object:
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; give the checkpoint file in it")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise CheckpointError(f"{path.name} is neither .safetensors nor .pth, .pt or .bin")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name} is empty")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise CheckpointError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    if not isinstance(error, pickle.UnpicklingError):
        kind = "safetensors" if path.suffix == ".safetensors" else "torch"
        reason = _shorten(f"{type(error).__name__}: {error}")
        return f"{path.name} cannot be read as a {kind} file ({reason})"
    advice = "save its state dict alone, best as .safetensors"
    if names := _unsafe_names(path, error):
        found = _shorten(", ".join(sorted(names)[:3]))
        return f"{path.name} holds more than plain tensors ({found}) and is not unpickled; {advice}"
    return f"{path.name} is no torch checkpoint that can be read safely; {advice}"


def _unsafe_names(path: Path, error: Exception) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old or damaged pickle: fall back on what the unpickler said
        return re.findall(r"GLOBAL ([\w.]+)", str(error))
