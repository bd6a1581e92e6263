"""timm's `config.json`: what a fine-tune is built from, named by and evaluated with."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from models.classes import ClassNames, described_names
from models.package import PackageError

CHANNELS = 3
# Arguments of timm's constructor that change nothing of the network we build and run.
HARMLESS_ARGUMENTS = {"num_classes", "drop_rate", "drop_path_rate", "proj_drop_rate"}

Names = list[str] | dict[int, str]
Triple = tuple[float, float, float]


class _Stated(BaseModel):
    """What may stand in `pretrained_cfg`, or on the top level of files without one."""

    num_classes: Annotated[int, Field(ge=1)] | None = None
    label_names: Names | None = None
    labels: Names | None = None  # what label_names was called once
    label_descriptions: dict[str, str] | None = None
    input_size: Annotated[list[int], Field(min_length=3, max_length=3)] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: Triple | None = None
    std: Triple | None = None
    global_pool: str | None = None


class _Config(_Stated):
    architecture: str | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: _Stated | None = None


@dataclass(frozen=True)
class TimmConfig:
    """What a `config.json` says.

    Attributes:
        path: of the file, for messages.
        architecture: the name timm builds, or None.
        classes: outputs of the classifier, or None.
        names: of the classes, or None.
        preprocessing: fields of `InputSpec` that it states.
    """

    path: Path
    architecture: str | None = None
    classes: int | None = None
    names: ClassNames | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)


def read_timm_config(path: Path) -> TimmConfig:
    """Read a `config.json` as timm saves it; the top level goes before `pretrained_cfg`.

    Raises:
        PackageError: it cannot be read, or asks for what metaserve does not do.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        config = _Config.model_validate_json(content)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PackageError(f"{path} is no config.json of timm: {where}: {first['msg']}") from error
    pretrained = config.pretrained_cfg or _Stated()
    stated = pretrained.model_dump(exclude_none=True)
    stated |= _Stated.model_dump(config, include=set(_Stated.model_fields), exclude_none=True)
    pooling = {"global_pool": stated["global_pool"]} if "global_pool" in stated else {}
    _refuse_other_networks(path, pooling | (config.model_args or {}))
    # timm's names may carry the tag of the weights a training started from.
    architecture = config.architecture and config.architecture.partition(".")[0]
    return TimmConfig(
        path=path,
        architecture=architecture,
        classes=stated.get("num_classes"),
        names=_names(path, stated),
        preprocessing=_preprocessing(path, stated),
    )


def _names(path: Path, stated: dict[str, Any]) -> ClassNames | None:
    names = stated.get("label_names", stated.get("labels"))
    if names is None:
        return None
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise PackageError(f"{path}: label_names leaves out classes between 0 and the last")
        names = [names[index] for index in range(len(names))]
    return described_names(str(path), tuple(names), stated.get("label_descriptions"))


def _preprocessing(path: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `InputSpec`, or refuse what our preprocessing cannot do."""
    fields: dict[str, Any] = {
        name: stated[name]
        for name in ("crop_pct", "interpolation", "mean", "std")
        if name in stated
    }
    channels, height, width = stated.get("input_size", (CHANNELS, 0, 0))
    if channels != CHANNELS:
        raise PackageError(
            f"{path} wants {channels} channels; metaserve feeds RGB images, that is 3"
        )
    if height != width:
        raise PackageError(f"{path} wants {height}x{width} images; metaserve feeds square ones")
    if height:
        fields["size"] = height
    mode = stated.get("crop_mode", "center")
    if mode != "center":
        raise PackageError(f"{path} wants crop_mode {mode!r}; metaserve crops the centre only")
    if fields.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
        raise PackageError(
            f"{path} wants interpolation {fields['interpolation']!r}; metaserve resizes bicubic or "
            "bilinear, see --interpolation"
        )
    return fields


def _refuse_other_networks(path: Path, arguments: dict[str, Any]) -> None:
    """Refuse constructor arguments that make another network than the named architecture."""
    same = {"in_chans": CHANNELS, "global_pool": "avg"}
    for name, value in arguments.items():
        if name not in HARMLESS_ARGUMENTS and not (name in same and same[name] == value):
            raise PackageError(
                f"{path} builds the network with {name}={value!r}, which metaserve does not"
            )
