# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md, followed: its blocks are written into a package, and what they add is used.

Other processes do it, since what is registered stays registered.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_helpers import in_a_fork
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"


def blocks() -> dict[str, str]:
    """Python blocks by the file that their first line names."""
    found = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return dict(found)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, code in blocks().items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    modules = sorted({Path(name).stem for name in blocks()} - {"__main__"})
    (tmp_path / "more/__init__.py").write_text("".join(f"from more import {module}\n" for module in modules))
    return tmp_path


def test_each_section_has_a_block():
    sections = re.findall(r"^### (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(blocks()) == len(sections) == PAGE.read_text().count("```python")


def test_what_the_page_names_is_there():
    prose = re.sub(r"^```python.*?^```$", "", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    package = ROOT / "anomalib_flowood"
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    # The places that diagrams begin lines with, and those that sentences name.
    places = re.findall(r"^([a-z_]+/[\w/]*)  ", prose, re.MULTILINE) + re.findall(r"`(\w+/[\w/]*(?:\.\w+)?)`", prose)
    assert len(places) > 20
    for place in places:
        found = [root / (place + suffix) for root in (package, ROOT) for suffix in ("", ".py")]
        assert any(path.exists() for path in found), place
    names = set(re.findall(r"`(\w+)`", prose)) | set(re.findall(r"\b[A-Z][a-z]+[A-Z]\w+", prose))
    source += "".join(blocks().values())
    missing = {name for name in names if name not in source and not (package / f"{name}.py").exists()}
    assert not missing - {"more", "FrEIA", "BASES"}


def test_what_the_page_adds_works_and_gets_the_tests_of_its_kind(package: Path):
    tests = [f"tests/flows/test_{kind}.py" for kind in ("masks", "couplings", "subnets", "architectures")]
    tests.append("tests/scores")
    # `more` is imported before tests are collected. No cache and no second process beside the suite's own.
    options = [
        "-v",
        "-pmore",
        "-pno:xdist",
        "-pno:cacheprovider",
        "-oaddopts=",
        "-kpage or vertical or separable or surprise",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/follow_architecture_page.py", *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for name in (
        "test_the_two_sides_never_overlap_and_neither_is_empty[vertical]",
        "test_only_the_masked_part_changes_and_only_the_fed_part_matters[3-none-vertical]",
        "test_inverse_and_log_determinant[vertical]",
        "test_pixel_flow_inverse_and_log_determinant[shape0-True-vertical]",
        "test_keeps_the_spatial_size_starts_at_zero_and_pickles[separable]",
        "test_every_weight_learns[separable",
        "test_every_score_has_its_name_a_source_and_a_direction[surprise]",
    ):
        assert name in done.stdout


def command(package: Path, module: str, *arguments: str) -> tuple[int, str, str]:
    """Run a module in a fork, which has imported anomalib already; return its status, output and errors."""
    said = package / "said.txt", package / "errors.txt"

    def run() -> None:
        os.chdir(package)
        sys.path.insert(0, str(package))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")

    status = os.waitstatus_to_exitcode(os.waitpid(in_a_fork(run, *said), 0)[1])
    return status, *(file.read_text(encoding="utf-8") for file in said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that nothing is imported anew")
def test_commands_know_a_checkpoint_of_ones_own(package: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    for part, count in (("train/good", 60), ("test/good", 3), ("test/bad", 3)):
        (tmp_path / "parts" / part).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / "parts" / part / f"{number}.png"
            )

    small = ["--model.backbone", "test_efficientnet", "--model.pre_trained", "false", "--model.subspace_dim", "8"]
    status, said, errors = command(package, "more", "train", "--model", "SmallFlow", *small, "--data", "parts")
    assert status == 0, errors[-3000:]
    checkpoint = "results/SmallFlow/OneClass/parts/v0/weights/lightning/model.ckpt"
    named = f"--model more.small_flow.SmallFlow --ckpt_path {checkpoint}"
    assert f"Next: flowood predict --data NEW_IMAGES {named}" in said
    predict = ["predict", "--data", "parts/test", "--ckpt_path", checkpoint]
    _, _, errors = command(package, "anomalib_flowood", *predict)
    assert "written by SmallFlow, a class that is not imported here" in errors
    assert "(--model more.small_flow.SmallFlow)" in errors
    for module, *arguments in (("more", *predict), ("anomalib_flowood", *predict[:3], *named.split())):
        status, said, errors = command(package, module, *arguments)
        assert status == 0, errors[-3000:]
        assert "of 6 images" in said
