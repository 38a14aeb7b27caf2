# SPDX-License-Identifier: Apache-2.0
"""Wheel and sdist: what is in them, what PyPI shows of them, and that the wheel works without a clone beside it."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
PACKAGE = "anomalib_flowood"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def files_of(folder: str, *patterns: str) -> set[str]:
    found = {path.relative_to(ROOT) for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
    return {str(path) for path in found if path.name[0] != "."}


def test_what_is_in_them(built):
    sdist, wheel = built
    package = files_of(PACKAGE, "*.py", "*.typed", "*.html", "*.css", "*.js", "README.md")
    configs = files_of("configs", "*.yaml")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert names == package | {f"{PACKAGE}/{name}" for name in configs}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | configs | {"LICENSE", "README.md", "pyproject.toml", "CHANGELOG.md"} <= names
    assert not [
        name
        for name in names
        if name.startswith(("tests", "benchmarks", "docs", "notebooks", ".")) and name != ".gitignore"
    ]


def test_what_pypi_shows_has_no_relative_link(built):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert text.startswith("# anomalib-flowood")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text)
    # Those of pictures without a link around them, and all others.
    assert not [link for _, link in links if not link.startswith(("https://", "#"))]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures
    assert all(link.startswith(f"{ADDRESS}/raw/main/docs/") for link in pictures)
    assert f"]({ADDRESS}/blob/main/CHANGELOG.md)" in text
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    assert {"Repository", "Changelog", "Documentation"} <= urls.keys()
    assert all(url.startswith(ADDRESS) for name, url in urls.items() if name != "Paper")
    pythons = {entry.split(" :: ")[-1] for entry in metadata.get_all("Classifier") if "Python :: 3." in entry}
    assert f">={min(pythons, key=lambda text: int(text.split('.')[1]))}" == metadata["Requires-Python"]


def test_the_wheel_works_on_its_own(built, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, built[1]]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}

    def flowood(*arguments: str) -> str:
        command = [sys.executable, site / "bin" / "flowood", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here, env=environment)
        return done.stdout

    assert "usage: flowood SUBCOMMAND" in flowood("--help")
    flowood("configs", "configs")
    assert {str(path.relative_to(here)) for path in here.rglob("*.yaml")} == files_of("configs", "*.yaml")
    assert "Everything that is required is here." in flowood("doctor")
    where = "import anomalib_flowood; print(anomalib_flowood.__file__)"
    imported = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, cwd=here, env=environment)
    assert imported.stdout.startswith(str(site))
