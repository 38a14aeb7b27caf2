# SPDX-License-Identifier: Apache-2.0
"""Every fit of the plan, in several processes, and one row of ``results.csv`` for each.

A finished row is never run again.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.fits import clock_time
from benchmarks.results import append_rows, check_columns, failed, finished, read_rows

from .fits import COLUMNS, run_fit
from .plan import Fit, plan
from .profiles import PARTS, Profile


def processes(profile: Profile) -> Executor:
    """Return the pool that fits are sent to."""
    # Not forked: a fork of a process whose PyTorch has threads may hang.
    threads = 1 if profile.accelerator == "cpu" else max(1, torch.get_num_threads())
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(profile.workers, context, initializer=_start_worker, initargs=(threads,))


def _start_worker(threads: int) -> None:
    """Set up a process of the pool, which ends when the one that sends it fits is killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _expected(fits: Iterable[Fit], rows: pd.DataFrame) -> float:
    """Seconds of one worker that fits will take, from those like them; a guess where there are none yet."""
    known = rows.groupby(["part", "detector"])["wall_s"].mean().to_dict() if len(rows) else {}
    mean = sum(known.values()) / len(known) if known else 60.0
    return sum(known.get((fit.part, fit.detector), mean + (fit.budget.seconds or 0) * (not known)) for fit in fits)


def run(
    profile: Profile,
    output: Path,
    root: str = "./datasets",
    parts: Sequence[str] = PARTS,
    console: Console | None = None,
    pool: Callable[[Profile], Executor] = processes,
) -> pd.DataFrame:
    """Run what is not finished.

    Args:
        profile: How much of everything.
        output: Folder of the rows and samples.
        root: Folder of the data sets that are given by name.
        parts: Which parts.
        console: Where to say how far it is.
        pool: Makes the pool that fits are sent to.

    Returns:
        All rows, of earlier runs too.

    Raises:
        ValueError: If the folder has rows of a version that measured other things.
    """
    console = console or Console(soft_wrap=True)
    check_columns(output, COLUMNS)
    every, done = plan(profile, parts), finished(output)
    left = {fit.key: fit for fit in every if fit.key not in done}
    console.print(f"{len(left)} fits to run, {len(every) - len(left)} finished before; rows in {output}")
    if not left:
        return read_rows(output)
    start, total = time.perf_counter(), len(left)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    executor = pool(profile)
    try:
        with bar:
            task = bar.add_task("fits", total=total)
            futures = {executor.submit(run_fit, fit, root, output): fit for fit in left.values()}
            for number, future in enumerate(as_completed(futures), start=1):
                fit = futures[future]
                try:
                    row = future.result()
                    said = f"AUROC {row['auroc']:.3f}, trained {row['fit_s']:,.0f} s, {row['images_seen']:,} images"
                except Exception as error:  # one broken fit must not cost the others
                    (row,) = failed(output, [fit.key], error)
                    said = f"[red]failed[/red] {row['error']}"
                append_rows(output, [row], COLUMNS)
                del left[fit.key]
                good = read_rows(output)
                seconds = _expected(left.values(), good[good["error"].isna()]) / profile.workers
                bar.update(task, advance=1, description=f"about {clock_time(seconds)} left")
                bar.console.print(
                    f"[bold]{number}/{total}[/bold] {fit.part} {fit.task}, {fit.detector}, seed {fit.seed}: {said} "
                    f"[dim]({clock_time(time.perf_counter() - start)} elapsed, about {clock_time(seconds)} left)[/dim]",
                    highlight=False,
                )
    finally:
        executor.shutdown(cancel_futures=True)
    return read_rows(output)
