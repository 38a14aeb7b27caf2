# SPDX-License-Identifier: Apache-2.0
import pytest
from model_helpers import DETECTORS

from anomalib_flowood.flows import AffineCoupling


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_couplings_of_every_detector_may_do_without_a_scale(detector):
    for scale in ("tanh", "none"):
        flow = detector(scale=scale, coupling_layers=4).model.flow
        found = [coupling.scale is None for coupling in flow.modules() if isinstance(coupling, AffineCoupling)]
        assert len(found) >= 4
        assert set(found) == {scale == "none"}
    with pytest.raises(ValueError, match="Unknown scale 'exp'. Known: none, tanh"):
        detector(scale="exp")
