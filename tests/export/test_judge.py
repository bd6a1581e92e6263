"""The bounds of the proof, each on its own."""

from __future__ import annotations

import pytest

from export.verify import VerificationError, judge
from models.package import Verification

GOOD = Verification(
    max_abs_logit_difference=1e-5,
    max_rel_logit_difference=1e-6,
    max_embedding_cosine_distance=1e-12,
    top1_agreement=1.0,
    batch_dependence=0.0,
    logit_tolerance=1e-4,
    images=5,
    runtime="test",
)


def test_good_figures_pass() -> None:
    judge(GOOD, "fp32")


@pytest.mark.parametrize(
    ("figure", "value", "complaint"),
    [
        ("max_abs_logit_difference", 2e-4, "logits differ by 0.0002"),
        ("max_embedding_cosine_distance", 2e-6, "embeddings are 2e-06 apart"),
        ("top1_agreement", 0.8, "the best class agrees on 80%"),
    ],
)
def test_one_figure_out_of_bounds_is_enough(figure: str, value: float, complaint: str) -> None:
    with pytest.raises(VerificationError, match=complaint):
        judge(GOOD.model_copy(update={figure: value}), "fp32")
