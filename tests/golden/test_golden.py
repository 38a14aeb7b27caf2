# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from golden_cases import CASES, SCORE_OF, keep, results


def agree(case: str, found: dict[str, np.ndarray], tolerance: float) -> None:
    kept = {name: value for name, value in keep(case).items() if not name.startswith("fitted ")}
    found = {name: value for name, value in found.items() if not name.startswith("fitted ")}
    assert found.keys() == kept.keys()
    for name, value in kept.items():
        scale = np.abs(value).max()  # shares that sum to a log-density cancel
        assert np.isfinite(scale), name
        np.testing.assert_allclose(
            found[name], value, rtol=tolerance, atol=tolerance * scale, err_msg=f"{case}: {name}"
        )


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_that_were_kept(case):
    agree(case, results(case, torch.float64, keep(case)), 1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("baseline")])
def test_scores_in_single_precision(case):
    # What some scores subtract from a log-density is nearly as large.
    agree(case, results(case, torch.float32, keep(case)), 1e-5 if SCORE_OF.get(case, "nll") == "nll" else 1e-3)


# Embeddings are fitted by their baselines, above: which way their directions point is the eigensolver's choice, and
# couplings see it.
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("maps")])
def test_a_fit_finds_what_it_found(case):
    agree(case, results(case, torch.float64), 1e-6)
