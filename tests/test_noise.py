# SPDX-License-Identifier: Apache-2.0
"""The command leaves out what no user can act on, and nothing else."""

import logging
import warnings
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from anomalib_flowood.noise import quieten
from anomalib_flowood.report.plots import score_histograms


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> _Kept:
    """A handler without noise, while the levels of loggers are put back afterwards."""
    for name in ("onnxscript", "onnx_ir"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    return _Kept()


def test_log_lines(kept: _Kept) -> None:
    quieten(kept)
    log = logging.getLogger("tests.noise")
    log.setLevel(logging.INFO)
    log.addHandler(kept)
    log.info("try installing [litlogger](https://pypi.org/project/litlogger/)")
    log.warning("Unexpected keys (%s) found", "conv_head.weight")
    log.warning("Failed to create openvino_telemetry file. Please allow write access to the following directory: /")
    log.warning("Could not create directory for storing client ID. No data will be sent.")
    log.warning("With 15 held-out normal images ...")
    log.removeHandler(kept)
    assert kept.lines == ["With 15 held-out normal images ..."]
    assert not logging.getLogger("onnxscript.optimizer").isEnabledFor(logging.INFO)


def test_the_exporter_of_torch_says_nothing_of_what_a_detector_does_not_have(kept: _Kept) -> None:
    quieten(kept)
    log = logging.getLogger("torch.onnx._internal.exporter._core")
    log.addHandler(kept)
    log.warning("Output node %s has None output. The output is ignored in the exported graph.", "output")
    log.warning("Skipping constant argument %s", "ConstantArgument(name='', value=None)")
    log.warning("Something else")
    log.removeHandler(kept)
    assert kept.lines == ["Something else"]


def test_warnings_of_lightning_are_those_that_it_gives(kept: _Kept, tmp_path: object) -> None:
    class Frozen(BoringModel):
        def on_fit_start(self) -> None:
            self.layer.eval()

        def configure_optimizers(self) -> None:
            """Nothing is trained."""

    def fit() -> list[str]:
        trainer = Trainer(
            max_steps=1, default_root_dir=str(tmp_path), logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            if silent:
                quieten(kept)
            trainer.fit(Frozen())
            warnings.warn("Something of the user's.", UserWarning, stacklevel=1)
        return [str(warning.message) for warning in caught]

    silent = False
    loud = " ".join(fit())
    assert "in eval mode" in loud
    assert "run with no optimizer" in loud
    silent = True
    quiet = " ".join(fit())
    assert "in eval mode" not in quiet
    assert "no optimizer" not in quiet
    assert "Something of the user's." in quiet


def test_names_in_scripts_that_matplotlib_has_no_letters_of(kept: _Kept, tmp_path: Path) -> None:
    columns = {"detector": "a", "data": "日本", "seed": 0, "source": ["b"] * 3 + ["c"] * 3, "label": [0] * 3 + [1] * 3}
    scores = pd.DataFrame(columns | {"score": range(6)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quieten(kept)
        score_histograms(scores, tmp_path / "scores.png")
    assert not said
