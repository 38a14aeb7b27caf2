# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pandas as pd
from paper_helpers import rows_of

from benchmarks.paper import plots
from benchmarks.paper.fits import TEMPERATURES, sample_path
from benchmarks.paper.profiles import (
    CHANNEL,
    CYCLE,
    GLOW,
)


def test_the_picture_shows_real_images_and_samples_of_both_flows(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(plots, "draw_images", lambda rows, names, path: shown.update(rows))
    rows = pd.DataFrame(
        [
            *rows_of("samples", GLOW, [0.1]),
            *rows_of("mask_epochs", GLOW, [0.1]),
            *rows_of("mask_epochs", CHANNEL, [0.1, 0.1]),  # no fit of its own for the picture
            *rows_of("mask_time", CYCLE, [0.5]),
        ]
    )
    for value, row in enumerate(rows.to_dict("records")):
        path = sample_path(tmp_path, tuple(row[name] for name in ("part", "task", "detector", "seed")))
        path.parent.mkdir(exist_ok=True)
        names = ("real", *(f"{temperature:g}" for temperature in TEMPERATURES))
        counts = {name: 3 if name == "real" else 4 for name in names}
        np.savez(path, **{name: np.full((count, 2, 2), 51 * value, np.uint8) for name, count in counts.items()})
    assert plots.draw_samples(rows, tmp_path, tmp_path / "samples.png")
    assert list(shown) == ["real", *(f"{flow}, T = {t}" for flow in ("RealNVP", "Glow") for t in ("1", "0.8", "0.6"))]
    assert {images.shape for images in shown.values()} == {(3, 1, 2, 2)}
    grey = {name: round(255 * float(images[0, 0, 0, 0])) for name, images in shown.items()}
    assert {grey[name] for name in grey if "RealNVP" in name} == {102}  # the first seed's
    assert {grey[name] for name in grey if "Glow" in name} == {0}
    assert not plots.draw_samples(rows, tmp_path / "elsewhere", tmp_path / "samples.png")


def test_samples_are_laid_out_in_lines():
    mosaic = plots._mosaic(np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8), columns=4)
    assert mosaic.shape == (9, 12)
    assert mosaic[3, 3] == 5  # second line, second image
    assert mosaic[2, 0] == 255
