# SPDX-License-Identifier: Apache-2.0
"""``import anomalib_flowood`` makes the detectors known to anomalib, whenever and however that one is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = "import importlib, sys; from importlib.util import find_spec\n"

# A package in anomalib's place, and a note of what is imported by name: what is registered, without the seconds.
STAND_IN = (
    "registered = []\n"
    "load = importlib.import_module\n"
    "importlib.import_module = lambda name: registered.append(name) or object()\n"
    "import anomalib_flowood\n"
)


def run(code: str, *paths: Path) -> None:
    search = "".join(f"sys.path.insert(0, {str(path)!r})\n" for path in paths)
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + search + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    package = tmp_path / "anomalib"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "models.py").write_text("import sys\nif hasattr(sys, 'broken'): raise ImportError")
    return tmp_path


@pytest.mark.parametrize(
    "between",
    [
        "",
        "assert find_spec('anomalib.models').name == 'anomalib.models'",
        "specs = [find_spec('anomalib.models') for _ in range(3)]; assert specs[0].loader.get_filename()",
        "assert find_spec('anomalib.nothing') is None",
        "importlib.reload(anomalib_flowood)",
        "importlib.reload(anomalib_flowood); find_spec('anomalib.models')",
        "sys.broken = True\n"
        "try: load('anomalib.models')\n"
        "except ImportError: assert not registered and 'anomalib.models' not in sys.modules\n"
        "else: sys.exit('imported what is broken')\n"
        "del sys.broken",
    ],
    ids=["nothing", "find_spec", "three", "another", "reload", "reload and find_spec", "failure"],
)
def test_registered_after_whatever_comes_between(stand_in: Path, between: str) -> None:
    run(
        f"{STAND_IN}{between}\n"
        "assert not registered\n"
        "load('anomalib.models')\n"
        "assert {'anomalib_flowood.data', 'anomalib_flowood.models'} <= {*registered}, registered\n",
        stand_in,
    )


def test_registered_at_once_where_anomalib_was_first(stand_in: Path) -> None:
    between = "load('anomalib.models'); find_spec('anomalib.models')"
    check = "assert {'anomalib_flowood.data', 'anomalib_flowood.models'} <= {*registered}, registered\n"
    run(STAND_IN.replace("import anomalib_flowood\n", f"{between}\nimport anomalib_flowood\n{check}"), stand_in)


def test_the_real_one() -> None:
    run(
        "import anomalib_flowood\n"
        "find_spec('anomalib.models')\n"
        "from anomalib.models import get_model, list_models\n"
        "assert {'pixel_flow', 'embedding_flow', 'feature_map_flow'} <= list_models()\n"
        "assert type(get_model('pixel_flow')).__module__.startswith('anomalib_flowood.')\n"
        "assert sys.modules['anomalib.models'].__spec__.loader.is_package('anomalib.models')\n"
    )


def test_a_failure_of_ours_is_not_forgotten(stand_in: Path) -> None:
    """Whoever imports anomalib again must not find it without our detectors."""
    run(
        "import anomalib_flowood\n"
        "sys.modules['anomalib_flowood.data'] = None\n"
        "for _ in range(2):\n"
        "    try: import anomalib.models\n"
        "    except ImportError as error: assert 'anomalib_flowood' in str(error)\n"
        "    else: sys.exit('imported')\n",
        stand_in,
    )
