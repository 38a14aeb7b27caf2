# SPDX-License-Identifier: Apache-2.0

import pytest
from paper_helpers import as_study_would, rows_of

from benchmarks.paper.claims import _CLAIMS, claims
from benchmarks.paper.plan import with_bottleneck
from benchmarks.paper.profiles import (
    CHECKERBOARD,
    CYCLE,
    EMBEDDING,
    GLOW,
    HORIZONTAL,
)
from benchmarks.paper.selections import pixel_runs


def test_claims_that_hold():
    found = claims(as_study_would())
    assert len(found) == len(_CLAIMS)
    assert [claim.text for claim in found if not claim.held] == []
    measured = "\n".join(claim.measured for claim in found)
    assert "0.030 ± 0.014 < 0.210 ± 0.014 < 0.820 ± 0.028" in measured
    assert "K = 2: 0.920 ± 0.014" in measured
    assert "2.50 times" in measured
    assert "0.985 ± 0.007 against 0.920 ± 0.014 (K = 2; the bottleneck)" in measured


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        # A gap of 0.03 between means of 0.05 and 0.08, whose standard deviations are 0.028 each.
        ("< horizontal <", {
            "checkerboard": rows_of("mask_time", CHECKERBOARD, [0.03, 0.07], bits_per_dim=2.5),
            "horizontal": rows_of("mask_time", HORIZONTAL, [0.06, 0.1], coadaptation=0.5, bits_per_dim=2.8),
        }),
        ("at least 0.90", {"k2": rows_of("bottleneck", "K = 2", [0.88, 0.91], bits_per_dim=4.5)}),
        ("Co-adaptation", {"cycle": rows_of("mask_time", CYCLE, [0.5, 0.52], coadaptation=0.26, bits_per_dim=3)}),
        ("Plain flows", {"glow": rows_of("mask_time", GLOW, [0.6, 0.6], bits_per_dim=3.2)}),
        ("smaller K detects", {"k100": rows_of("bottleneck", "K = 100", [0.89, 0.93], bits_per_dim=3.5)}),
        ("worse likelihood", {"k100": rows_of("bottleneck", "K = 100", [0.7, 0.72], bits_per_dim=4.6)}),
        ("multi-scale flows, too", {
            "squeezed glow": rows_of("multi_scale", with_bottleneck(GLOW), [0.09], bits_per_dim=2.7),
        }),
        ("pretrained", {"embedding": rows_of("embedding", EMBEDDING, [0.9, 0.95], bits_per_dim=None)}),
        ("One class", {"EmbeddingFlow 0": rows_of("one_class", EMBEDDING, [0.3], "fashion_mnist class 0")}),
    ],
)  # fmt: skip
def test_claims_that_do_not_hold(text, changes):
    found = claims(as_study_would(**changes))
    assert [text in claim.text for claim in found if not claim.held] == [True]


def test_better_likelihood_may_detect_better():
    better = rows_of("mask_time", CHECKERBOARD, [0.95, 0.96, 0.97, 0.98, 0.99], bits_per_dim=1.0)
    found = {claim.text: claim for claim in claims(as_study_would(checkerboard=better))}
    claim = next(found[text] for text in found if text.startswith("Better likelihood"))
    rows = pixel_runs(as_study_would(checkerboard=better))
    correlation = rows["bits_per_dim"].corr(rows["auroc"], method="spearman")
    assert correlation < 0.2
    assert f"{correlation:+.2f}" in claim.measured
    assert not claim.held
