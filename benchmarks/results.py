# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: arguments, rows of results that outlive an interruption, and where they are shown."""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape

KEY = ("part", "task", "detector", "seed")
"""What tells one row from another."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Read an argument that says how many."""
    if (value := int(text)) < 1:
        msg = f"has to be 1 at least, not {text}"
        raise argparse.ArgumentTypeError(msg)
    return value


def seed(text: str) -> int:
    """Read a seed, of 32 bits."""
    if not 0 <= (value := int(text)) < 2**32:
        msg = f"a seed lies from 0 to {2**32 - 1}, and {text} does not"
        raise argparse.ArgumentTypeError(msg)
    return value


def seconds(text: str) -> float:
    """Read for how long something may last."""
    if not (value := float(text)) > 0:
        msg = f"has to be more than 0, not {text}"
        raise argparse.ArgumentTypeError(msg)
    return value


def refused(error: Exception) -> int:
    """Print why nothing is run; returns the exit status."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
    return 2


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def read_rows(output: Path) -> pd.DataFrame:
    """Return the last row of every key; failures included."""
    path = output / "results.csv"
    if not path.is_file():
        return pd.DataFrame(columns=[*KEY, "error"])
    texts = dict.fromkeys(("part", "task", "detector", "error", "stopped_by"), str)
    # A folder may be called "NA": of what tells rows apart nothing is missing.
    missing = {str(name): ["", "nan", "NaN"] for name in pd.read_csv(path, nrows=0) if name not in KEY}
    rows = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=missing)
    return rows.drop_duplicates(list(KEY), keep="last", ignore_index=True)


def append_rows(output: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Add rows to ``results.csv``, whose columns these are."""
    path = output / "results.csv"
    output.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_columns(output: Path, columns: Sequence[str]) -> None:
    """Refuse rows of a version that measured other things: new ones would not fit below them.

    Raises:
        ValueError: If ``results.csv`` is there and has other columns than these.
    """
    path = output / "results.csv"
    if not path.is_file():
        return
    found = list(pd.read_csv(path, nrows=0).columns)
    if found != list(columns):
        differ = sorted(set(found) ^ set(columns)) or ["their order"]
        msg = (
            f"{path} was written by a version that measured other things ({', '.join(differ)}). Move it away, or name "
            "another folder with --output."
        )
        raise ValueError(msg)


def failed(output: Path, keys: Iterable[tuple[str, str, str, int]], error: Exception) -> list[dict[str, Any]]:
    """Write an error to ``errors.log``; return the rows that it leaves in the place of results, to be run again."""
    keys = list(keys)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "errors.log").open("a", encoding="utf-8") as file:
        file.write(f"{keys[0]}\n{''.join(traceback.format_exception(error))}\n")
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return [{**dict(zip(KEY, key, strict=True)), "error": said} for key in keys]


def finished(output: Path) -> set[tuple[str, str, str, int]]:
    """Return the keys of the rows that need not be run again."""
    rows = read_rows(output)
    done = rows[rows["error"].isna()]
    return set(zip(done["part"], done["task"], done["detector"], done["seed"].astype(int), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def rows_to_report(output: Path) -> pd.DataFrame:
    """Return the rows of a benchmark that has run.

    Raises:
        FileNotFoundError: If there are none.
    """
    rows = read_rows(output)
    if rows.empty:
        msg = f"There are no rows in {output}: run the benchmark first."
        raise FileNotFoundError(msg)
    return rows


def publish(output: Path, into: Path, name: str, text: str, pictures: Sequence[tuple[str, str]]) -> list[Path]:
    """Write tables, copy the rows, and show both in a README.

    Args:
        output: Folder of the rows, in which ``tables.md`` is written.
        into: Folder of the pictures, to which the rows are copied. Text and pictures go between the markers of its
            README.md, ``<!-- name: begin -->`` and ``<!-- name: end -->``, where it has them.
        name: The benchmark's, in the markers.
        text: The tables in Markdown.
        pictures: File names of the pictures, and their captions.

    Returns:
        What was written, the pictures included.
    """
    (output / "tables.md").write_text(text, encoding="utf-8")
    written = [output / "tables.md"]
    if into != output:
        written.append(Path(shutil.copyfile(output / "results.csv", into / "results.csv")))
    written += [into / file for file, _ in pictures]
    readme = into / "README.md"
    shown = "".join(f"\n![{caption}]({file})\n" for file, caption in pictures)
    if readme.is_file() and put_between(readme, name, f"{text}{shown}"):
        written.append(readme)
    return written


def put_between(readme: Path, name: str, text: str) -> bool:
    """Put a text between the markers ``<!-- name: begin -->`` and ``<!-- name: end -->`` of a file, if it has them.

    Returns:
        Whether it has them.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(before):
        return False
    readme.write_text(pattern.sub(lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", before), encoding="utf-8")
    return True


def announce(output: Path, written: Sequence[Path], console: Console) -> int:
    """Print the tables, what was written and what failed; returns the exit status."""
    console.print((output / "tables.md").read_text(encoding="utf-8"), markup=False, highlight=False)
    return announce_files(output, written, console)


def announce_files(output: Path, written: Sequence[Path], console: Console) -> int:
    """Print what was written and what failed; returns the exit status."""
    console.print(f"Written: {', '.join(map(str, written))}", markup=False, highlight=False)
    count = read_rows(output)["error"].notna().sum()
    if count:
        console.print(f"{count} rows failed; see {output / 'errors.log'}. Run again to retry them.", highlight=False)
    return 1 if count else 0


def report_rows(write: Callable[[Path, Path], Sequence[Path]], output: Path, into: Path, console: Console) -> int:
    """Rebuild a benchmark's tables and pictures and :func:`announce` them; returns the exit status.

    Args:
        write: Does so from the rows in its first folder, into its second, and returns what it wrote.
        output: Folder of the rows.
        into: Folder of the README and the pictures.
        console: Where to print.
    """
    try:
        written = write(output, into)
    except FileNotFoundError as error:
        return refused(error)
    return announce(output, written, console)
