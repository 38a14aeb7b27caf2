# SPDX-License-Identifier: Apache-2.0
"""Arguments of Lightning's trainer, as they are typed and as a configuration has them."""

import json
from pathlib import Path
from typing import Union

import pytest
from lightning.pytorch import Trainer

from anomalib_flowood.cli.commands import FlowoodCLI
from anomalib_flowood.data import OneClass

LIMITS = [f"limit_{kind}_batches" for kind in ("train", "val", "test", "predict")]


@pytest.fixture
def float_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's cache of types gives the union in which the float is first, as another library had it."""
    for name in LIMITS:
        monkeypatch.setitem(Trainer.__init__.__annotations__, name, Union[float, int, None])  # noqa: UP007


@pytest.mark.usefixtures("float_first")
@pytest.mark.parametrize("in_file", [False, True])
def test_a_whole_number_of_batches_is_one(in_file: bool, tmp_path: Path) -> None:
    values = dict(zip(LIMITS, (1, 0.5, 1.0, 0), strict=True))
    if in_file:
        (tmp_path / "file.yaml").write_text(f"trainer: {json.dumps(values)}\n")
        given = ["--config", str(tmp_path / "file.yaml")]
    else:
        given = [f"--trainer.{name}={value}" for name, value in values.items()]
    data = f"{OneClass.__module__}.{OneClass.__name__}"
    cli = FlowoodCLI(["fit", *given, "--data", data, "--data.dataset", str(tmp_path)], run=False)
    found = {name: cli.config["fit"]["trainer"][name] for name in LIMITS}
    assert {name: (value, type(value)) for name, value in found.items()} == {
        name: (value, type(value)) for name, value in values.items()
    }
    options = cli.subcommand_parsers["fit"]._option_string_actions
    assert all("[int, float" in str(options[f"--trainer.{name}"]._typehint) for name in LIMITS)
