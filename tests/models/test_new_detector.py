# SPDX-License-Identifier: Apache-2.0
"""A new detector is one folder and one registration, in `models/__init__.py`."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anomalib_flowood
from anomalib_flowood import models

PACKAGE = Path(anomalib_flowood.__file__).parent

DETECTOR = '''
from functools import partial

from anomalib.models.components import AnomalibModule

from anomalib_flowood.flows import StandardNormal, vector_flow
from anomalib_flowood.models.components import FlowModel, FlowModule


class ColourModel(FlowModel):
    """A flow on the mean colour of an image."""

    def __init__(self, score):
        new_flow = partial(vector_flow, 3, coupling_layers=2, hidden_channels=4)
        super().__init__(new_flow, StandardNormal(), 3, levels=1, score=score)

    def inputs(self, images):
        return (self.checked(images).mean((2, 3)),)


class ColourFlow(FlowModule, AnomalibModule):
    """Its detector."""

    def __init__(self, score="nll", max_epochs=1, learning_rate=1e-3):
        super().__init__()
        self.max_epochs, self.learning_rate = max_epochs, learning_rate
        self.model = ColourModel(score)

    def training_inputs(self, batch):
        return self.inputs_of(batch)
'''

CHECK = """
import pathlib, sys
import anomalib_flowood
assert "anomalib.models" not in sys.modules
import anomalib_flowood.flows
assert "anomalib.models" not in sys.modules
from anomalib_flowood import ColourFlow, open_checkpoint
from anomalib_flowood import *
PixelFlow, CrossDataset, ColourFlow
from anomalib.models import get_model, list_models
assert "colour_flow" in list_models()
for named in ("colour_flow", {"class_path": "ColourFlow"}, {"class_path": "anomalib_flowood.ColourFlow"}):
    assert type(get_model(named)) is ColourFlow

from anomalib_flowood.benchmark.building import find_class
assert find_class("model", "colour_flow") is ColourFlow
from anomalib_flowood.cli import main
main(["fit", "--model", "ColourFlow", "--data", sys.argv[1], "--trainer.accelerator", "cpu"])
(checkpoint,) = pathlib.Path("results/ColourFlow").rglob("*.ckpt")
assert type(open_checkpoint(checkpoint)) is ColourFlow
main(["score", "--data", sys.argv[1], "--ckpt_path", str(checkpoint), "--score", "typicality", "--output", "new.ckpt"])
assert open_checkpoint("new.ckpt").model.scorer.name == "typicality"
from anomalib_flowood.explain.explanation import check_explainable
check_explainable(ColourFlow)
print("all of it")
"""


def test_a_new_detector_is_one_folder_and_one_registration(tmp_path):
    from model_helpers import data

    data(tmp_path)  # writes ramps/ and squares/
    (tmp_path / "data.yaml").write_text(
        "class_path: anomalib_flowood.data.CrossDataset\n"
        "init_args: {in_distribution: ramps, out_of_distribution: [squares], val_split_ratio: 0.2}\n"
    )
    package = tmp_path / "anomalib_flowood"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "models" / "colour_flow").mkdir()
    (package / "models" / "colour_flow" / "__init__.py").write_text(DETECTOR)
    registration = package / "models" / "__init__.py"
    text = registration.read_text().replace("from .pixel_flow", "from .colour_flow import ColourFlow\nfrom .pixel_flow")
    registration.write_text(text.replace('"PixelFlow"]', '"PixelFlow", "ColourFlow"]'))
    result = subprocess.run(
        [sys.executable, "-c", CHECK, "data.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "all of it" in result.stdout, result.stderr[-3000:]


def test_no_other_module_knows_a_detector_by_its_class():
    folders = [PACKAGE / "models" / re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in models.__all__]
    assert all(folder.is_dir() for folder in folders)
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "models" / "__init__.py" or any(folder in path.parents for folder in folders):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            # A name, an attribute, an import, a string; sentences may speak of detectors.
            found = {
                value
                for field in ("id", "attr", "name", "value")
                if isinstance(value := getattr(node, field, None), str)
            }
            assert not found & set(models.__all__), (path, node.lineno)
