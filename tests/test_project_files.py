# SPDX-License-Identifier: Apache-2.0
"""Files about the project that nothing imports: whether they parse, and agree with pyproject.toml and the Makefile."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from anomalib_flowood import __version__

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def parsed(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_workflow_lints_and_tests_every_python_that_is_promised():
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python-version"]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert f'requires-python = ">={versions[0]}"' in PYPROJECT
    assert f'target-version = "py{versions[0].replace(".", "")}"' in PYPROJECT
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT) == versions

    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert {"make lint", "make test", ".venv/bin/pip check"} <= set(commands["test"])
    assert commands["pre-commit"] == ["make pre-commit"]
    made = re.findall(r"make ([\w-]+)", str(commands))
    assert set(made) <= targets()


def test_the_hooks_are_make_lints_programs():
    local = next(repo for repo in parsed(".pre-commit-config.yaml")["repos"] if repo["repo"] == "local")
    programs = {hook["entry"].split()[0] for hook in local["hooks"]}
    assert programs == {".venv/bin/ruff", ".venv/bin/mypy"}
    for program in programs:  # none of a release of its own
        assert re.search(rf'"{Path(program).name}[><=]', PYPROJECT)


def test_the_citation_has_what_its_schema_requires():
    citation = parsed("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    assert f'license = "{citation["license"]}"' in PYPROJECT
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "2006.08545" in paper["url"]


def test_contributing_names_targets_that_there_are():
    named = re.findall(r"`?make ([a-z][\w-]*)", (ROOT / "CONTRIBUTING.md").read_text())
    assert {"lint", "test", "pre-commit"} <= set(named) <= targets()


def test_the_dockerfile_serves_as_somebody_who_may_do_little():
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())  # one line for each instruction
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    final = lines[max(place for place, (word, _) in enumerate(lines) if word == "FROM") :]
    said = dict(final)
    assert list(said).index("USER") < list(said).index("ENTRYPOINT")
    assert said["USER"] not in {"root", "0"}
    assert json.loads(said["ENTRYPOINT"]) == ["flowood", "serve"]
    assert json.loads(said["CMD"]) == ["/model", "--host", "0.0.0.0"]
    (python,) = set(re.findall(r"FROM python:([\d.]+)-slim", text))
    assert f'"{python}"' in (ROOT / ".github/workflows/ci.yml").read_text()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for name, what in lines if name == "COPY" and "--from" not in what for word in what.split()[:-1]]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / name).exists() for name in copied)
    # What a wheel is built of.
    needed = {
        'fragments = [{ path = "README.md" }]',
        'license-files = ["LICENSE"]',
        'configs = "anomalib_flowood/configs"',
    }
    assert needed <= set(PYPROJECT.splitlines())
    assert {"README.md", "LICENSE", "configs", "pyproject.toml", "anomalib_flowood"} <= set(copied)
    extras = re.search(r"pip install '\.\[([\w,]+)\]'", text)[1].split(",")
    assert all(f"\n{extra} = [" in PYPROJECT for extra in extras)
    assert "/health/ready" in said["HEALTHCHECK"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(("target", "said"), [("report", "RUN=folder"), ("suite", 'FOLDERS="one another"')])
def test_a_target_without_what_it_is_for_says_how_to_give_it(target, said, tmp_path):
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    there = ["-o", ".venv/offline"]  # nothing is installed
    made = subprocess.run(
        ["make", *there, target, "RUN=" if target == "report" else "FOLDERS="],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert made.returncode
    assert said in made.stderr
