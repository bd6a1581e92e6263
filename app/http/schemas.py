"""The bodies of replies and queries, as OpenAPI shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.engine.base import Profile


class ClassifyQuery(BaseModel):
    """Query parameters of /classify."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, Field(ge=1, description="How many classes, at most all.")] = 5


class EmbedQuery(BaseModel):
    """Query parameters of /embed."""

    model_config = ConfigDict(extra="forbid")

    normalize: Annotated[bool, Field(description="Scale the vector to length one.")] = False
    encoding: Annotated[
        Literal["float", "base64"],
        Field(description="A list of numbers, or little-endian float32 in base64."),
    ] = "float"


class Timing(BaseModel):
    """Milliseconds an image spent in each stage; `total` is since the request arrived."""

    decode: float
    queue: float
    inference: float
    total: float


class Prediction(BaseModel):
    """One class of a ranking; `label` is null where the package has no labels."""

    index: int
    label: str | None
    probability: float


class WordNetPrediction(Prediction):
    """One class of a ranking, where the package's classes have WordNet ids."""

    wordnet_id: str


class ErrorObject(BaseModel):
    """What went wrong: a stable code and a sentence."""

    code: str
    message: str


class Error(BaseModel):
    """The body of every error."""

    error: ErrorObject
    request_id: str


class ItemError(BaseModel):
    """In the place of a result whose image could not be answered."""

    error: ErrorObject


class ClassifyItem(BaseModel):
    """The ranking of one image among several, most probable class first."""

    predictions: list[Prediction | WordNetPrediction]
    timing_ms: Timing


class ClassifyOne(ClassifyItem):
    """The reply to one image."""

    model: str
    version: str


class ClassifySeveral(BaseModel):
    """The reply to several images, in the order sent."""

    model: str
    version: str
    results: list[ClassifyItem | ItemError]


class EmbedItem(BaseModel):
    """The embedding of one image among several."""

    embedding: list[float] | str
    dim: int
    normalized: bool
    timing_ms: Timing


class EmbedOne(EmbedItem):
    """The reply to one image."""

    model: str
    version: str


class EmbedSeveral(BaseModel):
    """The reply to several images, in the order sent."""

    model: str
    version: str
    results: list[EmbedItem | ItemError]


class Proof(BaseModel):
    """How far the served numbers are from torch in float32.

    The `export_` figures are the package's, the others were measured when this service started.
    """

    export_max_abs_logit_difference: float
    export_max_embedding_cosine_distance: float
    export_top1_agreement: float
    max_abs_logit_difference: float | None
    batch_dependence: float | None


class BackendProof(BaseModel):
    """How far one backend was from torch in float32 when `metaserve verify` proved it."""

    backend: str
    precision: str
    device: str
    runtime: str
    max_abs_logit_difference: float
    logit_tolerance: float
    max_embedding_cosine_distance: float
    top1_agreement: float
    batch_dependence: float


class EngineProfile(BaseModel):
    """What warm-up measured on this machine, and how batches are formed for it.

    `batch_ms` is of batches that have the machine to themselves, `lane_batch_ms` of batches of one
    thread each while `lanes` of them run; an idle engine answers up to `wide_up_to` waiting images
    the first way and more the second. `pads_from` says from how many images on it pays to pad a
    batch up to a size that the device prepared.
    """

    images_per_second: float
    max_batch_size: int
    batch_ms: dict[str, float]
    threads: int | None
    lanes: int
    lane_batch_size: int
    lane_batch_ms: dict[str, float]
    wide_up_to: int
    pads_from: dict[str, int]

    @classmethod
    def of(cls, profile: Profile) -> EngineProfile:
        """Return a profile as JSON has it: times in milliseconds, sizes as keys."""
        return cls(
            images_per_second=round(profile.images_per_second, 1),
            max_batch_size=profile.max_batch_size,
            batch_ms=_milliseconds(profile.batch_seconds),
            threads=profile.threads,
            lanes=profile.lanes,
            lane_batch_size=profile.lane_batch_size,
            lane_batch_ms=_milliseconds(profile.lane_batch_seconds),
            wide_up_to=profile.wide_up_to,
            pads_from={str(size): least for size, least in profile.pads_from.items()},
        )


def _milliseconds(batch_seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(size): round(seconds * 1e3, 3) for size, seconds in batch_seconds.items()}


class ModelInfo(BaseModel):
    """The loaded package and what runs it."""

    name: str
    version: str
    variant: str
    input_size: int
    classes: int
    dim: int
    labels: bool
    backend: str
    precision: str
    device: str
    runtime: str
    max_batch_size: int
    batch_ms: dict[str, float]
    profile: EngineProfile
    proof: Proof
    proofs: list[BackendProof]
    evaluation: dict[str, str | int | float] | None


class Health(BaseModel):
    """A probe's good answer."""

    status: str
