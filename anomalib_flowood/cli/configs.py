# SPDX-License-Identifier: Apache-2.0
"""``flowood configs``: the configuration files that come with the package, copied to where they can be changed."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from anomalib_flowood.files import write_text


def add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``configs``."""
    parser.add_argument("folder", type=str, help="Folder to write them to; made if missing.")
    parser.add_argument("--overwrite", action="store_true", help="Overwrite files that differ.")


def run(arguments: Namespace) -> None:
    """Copy the files, and say which there are.

    Raises:
        FileExistsError: If one of them is there and differs, and shall not be overwritten; nothing is written then.
    """
    source, folder = _source(), Path(arguments.folder)
    texts = {path.relative_to(source): path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.yaml"))}
    taken = [name for name, text in texts.items() if _differs(folder / name, text)]
    if taken and not arguments.overwrite:
        names = ", ".join(str(folder / name) for name in taken)
        msg = f"There already, and different: {names}. Name another folder, or add --overwrite."
        raise FileExistsError(msg)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)
        print(folder / name)


def _source() -> Path:
    """Where they are: within an installed package, and beside it in a clone."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def _differs(path: Path, text: str) -> bool:
    return path.exists() and (not path.is_file() or path.read_bytes() != text.encode())
