# SPDX-License-Identifier: Apache-2.0
"""Pages of tables: figures and bars, each part by detector and folder, what rotations and flows bring, backbones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import pandas as pd

from benchmarks.contest.detectors import NO_BANK, ONE_KIND, TRAINED, UNTURNED
from benchmarks.contest.tasks import FEW
from benchmarks.results import put_between, read_rows
from benchmarks.tables import markdown, short_number

from .bars import bars
from .cells import column, side_by_side, signed, three
from .selections import behind_best_rival, by_folder, gains, is_rival, of_part, split_tasks, usual_fit, whole

FOLDER_PARTS = {
    "industrial": "A model for each folder",
    "few": f"A model for {FEW} images of each folder",
    "unified": "One model for all folders",
}
SMALL_PARTS = {"one_class": "One class of small images", "left_out": "Nine classes of small images against one"}

SETS_MARKER = "all sets"
"""Marker of the READMEs that show the table of all folders alone."""


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each detector, the best mean rank first.

    Args:
        rows: Those of one part, without failures, of seeds that have every folder.

    Returns:
        By detector: mean image AUROC (``auroc``) and its standard deviation over seeds (``spread``), mean rank by
        image AUROC (``rank``: 1 is the best, those that are level share theirs), mean AUPRO and pixel AUROC over the
        folders that have masks (``aupro``, ``pixel_auroc``), mean seconds of a fit (``fit_s``).
    """
    each = rows.groupby(["detector", "task"])[["auroc", "aupro", "pixel_auroc", "fit_s"]].mean()
    table = each.groupby("detector").mean()
    table["spread"] = rows.groupby(["detector", "seed"])["auroc"].mean().groupby("detector").std()
    table["rank"] = each["auroc"].groupby("task").rank(ascending=False).groupby("detector").mean()
    return table.sort_values(["rank", "auroc"], ascending=[True, False])


def in_short(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the figures by which detectors are compared, a line for each, the best mean rank first.

    Args:
        rows: Those of one stand, as :func:`benchmarks.suite.selections.split_tasks` returns them.

    Returns:
        By detector: mean rank by image AUROC (``rank``), mean image AUROC with a model for each folder (``each``), how
        far it is below the best rival where it is farthest (``worst``) and on which folder (``where``), mean image
        AUROC with a few images (``few``) and with one model for all (``unified``), that of all folders' test images
        together with that model (``pooled``), seconds and passes of the backbone of a fit to about 300 images
        (``fit_s``, ``passes``).
    """
    some = of_part(rows, "industrial")
    folders = by_folder(some)
    table = summary(whole(some))[["rank"]]
    table["each"] = folders.mean(axis=1)
    behind = behind_best_rival(folders).dropna(axis=1, how="all")
    table["worst"] = behind.max(axis=1)
    table["where"] = behind.idxmax(axis=1) if len(behind.columns) else ""
    for part in ("few", "unified", "pooled"):
        table[part] = by_folder(of_part(rows, part)).mean(axis=1)
    return table.join(usual_fit(some))


def _in_short(rows: pd.DataFrame) -> list[str]:
    if of_part(rows, "industrial").empty:
        return []
    table = in_short(rows)
    scores = {
        "each": column(table["each"]),
        "few": column(table["few"]),
        "unified": column(table["unified"]),
        "pooled": column(table["pooled"]),
        "worst": column(-table["worst"], signed),
    }
    costs = {
        "fit s": [short_number(pd.Series([value])) for value in table["fit_s"]],
        "passes": [three(value, 2) for value in table["passes"]],
    }
    said = (
        f"Mean image AUROC: a model for *each* folder, for a *few* ({FEW}) images of each, *unified* for all; with the "
        "latter that of all test images together (*pooled*), as one threshold meets them; *worst*: distance to the "
        "best rival on the folder where it is least."
    )
    cost = (
        "A fit to about 300 images, in seconds and in *passes*, in each of which every image is read and shown to the "
        "backbone:"
    )
    below = [
        f"{name} on {where} ({signed(-worst)})"
        for name, where, worst in zip(table.index, table["where"], table["worst"], strict=True)
        if not is_rival(name) and isinstance(where, str) and where
    ]
    worst = [f"Farthest below the best rival: {', '.join(below)}."] if below else []
    tables = [*side_by_side(table.index, scores), *worst, cost, *side_by_side(table.index, costs)]
    return ["### In short", said, *tables]


def _bars(rows: pd.DataFrame) -> list[str]:
    """Bars on the first backbone and size, and on others that have rivals, too."""
    texts: list[str] = []
    for stand, some in rows.groupby("stand", sort=False):
        found = bars(some)
        if not found or (texts and not some["detector"].map(is_rival).any()):
            continue
        lines = [[bar.figure, bar.bar, bar.reached, "yes" if bar.held else "**no**"] for bar in found]
        texts += [f"{stand} pixels:", markdown(["figure", "bar", "reached", "held"], lines, numbers=False)]
    return ["### Bars", *texts] if texts else []


def _per_folder(rows: pd.DataFrame, order: pd.Index, metric: str) -> dict[str, list[str]]:
    """For each folder that has the metric its column."""
    means = rows.groupby(["task", "detector"])[metric].mean().unstack("task").loc[order].dropna(axis=1, how="all")
    return {name: column(means[name]) for name in means.columns}


def _part(rows: pd.DataFrame) -> list[str]:
    """What one part has to show."""
    folders = rows["task"].nunique()
    # Means are over the same folders for all: of the seeds that have them all, and of no other detector.
    done = whole(rows)
    rest = rows[~rows["detector"].isin(done["detector"])]
    missing = sorted(set(rest["detector"]))
    table = summary(done)
    table = table.reindex([*table.index, *missing])
    shown = pd.concat([done, rest])
    means = {
        "AUROC ↑": column(table["auroc"]),
        "± seeds": [three(value) for value in table["spread"]],
        "rank": [three(value, 1) for value in table["rank"]],
        "AUPRO ↑": column(table["aupro"]),
        "pixel ↑": column(table["pixel_auroc"]),
        "fit s": [short_number(pd.Series([value])) for value in table["fit_s"]],
    }
    texts = [f"Mean over {folders} folder{'s' * (folders > 1)}:", *side_by_side(table.index, means)]
    texts += ["Image AUROC on each:", *side_by_side(table.index, _per_folder(shown, table.index, "auroc"))]
    with_maps = shown[shown["aupro"].notna()]
    if not with_maps.empty:
        order = table.index[table.index.isin(with_maps["detector"])]
        texts += ["AUPRO on each that has masks:", *side_by_side(order, _per_folder(with_maps, order, "aupro"))]
    return [*texts, f"Without a mean, for want of a folder: {', '.join(missing)}."] if missing else texts


def _small_part(rows: pd.DataFrame) -> list[str]:
    """Means over the classes of each set of small images."""
    sets = rows["task"].str.extract(r"^(\w+) ")[0]
    tables = {name: by_folder(rows[sets == name]) for name in sorted(sets.dropna().unique())}
    means = pd.DataFrame({name: table.mean(axis=1) for name, table in tables.items() if len(table)})
    if means.empty:
        return []
    means = means.loc[means.mean(axis=1).sort_values(ascending=False).index]
    counts = ", ".join(f"{len(tables[name].columns)} of {name}" for name in means.columns)
    columns = {name: column(means[name]) for name in means.columns}
    return [f"Mean image AUROC over the tasks ({counts}):", *side_by_side(means.index, columns)]


def _without(variants: Mapping[str, str]) -> dict[str, str]:
    """Detectors, and their variants that lack something."""
    return {of: name for name, of in variants.items()}


def _what_brings(title: str, said: str, pairs: Mapping[str, str], rows: pd.DataFrame) -> list[str]:
    """What a part of detectors brings, folder by folder.

    Args:
        title: Of the section.
        said: What the differences are.
        pairs: Detectors that have it, and the same without it.
        rows: Those of one stand.
    """
    kinds = {
        "each: AUROC": ("industrial", "auroc"),
        "each: AUPRO": ("industrial", "aupro"),
        "few: AUROC": ("few", "auroc"),
        "unified: AUROC": ("unified", "auroc"),
    }
    texts = []
    for detector, without in pairs.items():
        found = {name: gains(of_part(rows, part), detector, without, metric) for name, (part, metric) in kinds.items()}
        found = {name: table for name, table in found.items() if not table.empty}
        if not found:
            continue
        folders = sorted({folder for table in found.values() for folder in table.index})
        columns = {name: [_gain(table, folder) for folder in folders] for name, table in found.items()}
        for name, table in found.items():
            means = table.dropna(axis=1).mean()  # of the seeds that have every folder
            columns[name].append(_gain(pd.DataFrame([means], index=["mean"]), "mean") if len(means) else "–")
        texts += [f"{detector} against {without}:", *side_by_side(pd.Index([*folders, "mean"]), columns, "folder")]
    return [f"### What {title}", said, *texts] if texts else []


def _gain(table: pd.DataFrame, folder: str) -> str:
    values = table.loc[folder].dropna() if folder in table.index else pd.Series(dtype=float)
    if values.empty:
        return "–"
    return signed(values.to_numpy().mean()) + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def _stands(rows: pd.DataFrame) -> list[str]:
    """The same figures on every backbone and size, of detectors that have them on several."""
    texts = ["### Another backbone, another size"]
    figures = {
        "Mean image AUROC, a model for each folder": ("industrial", "auroc"),
        "Mean AUPRO over the folders with masks": ("industrial", "aupro"),
        f"Mean image AUROC, a model for {FEW} images of each folder": ("few", "auroc"),
        "Mean image AUROC, one model for all folders": ("unified", "auroc"),
        "Image AUROC of all folders' test images together, the same model": ("pooled", "auroc"),
    }
    for title, (part, metric) in figures.items():
        stands = rows.groupby("stand", sort=False)
        means = pd.DataFrame({stand: by_folder(of_part(some, part), metric).mean(axis=1) for stand, some in stands})
        means = means.dropna(thresh=2).dropna(axis=1, how="all")
        if means.empty:
            continue
        means = means.sort_values(means.columns[0], ascending=False)
        columns = {name: column(means[name]) for name in means.columns}
        texts += [f"{title}:", *side_by_side(means.index, columns, room=None)]
        if (part, metric) == ("industrial", "auroc"):
            worst = pd.DataFrame(
                {stand: -behind_best_rival(by_folder(of_part(some, part))).max(axis=1) for stand, some in stands}
            )
            worst = worst.reindex(means.index)[means.columns].dropna(thresh=2)
            if worst.empty:
                continue
            shown = {stand: column(worst[stand], signed) for stand in worst.columns}
            texts += ["The same, distance to the best rival on the folder where it is least:"]
            texts += side_by_side(worst.index, shown, room=None)
    return texts if len(texts) > 1 else []


def all_sets(rows: pd.DataFrame) -> str:
    """Return the table of all folders, for READMEs of detectors: what each detector reaches where.

    Args:
        rows: Those of one stand, as :func:`benchmarks.suite.selections.split_tasks` returns them.
    """
    some = of_part(rows, "industrial")
    if some.empty:
        return ""
    texts = []
    table = in_short(rows)
    extra = {"mean": column(table["each"])}
    extra |= {f"{FEW} images": column(table["few"])} if table["few"].notna().any() else {}
    extra |= {"one model": column(table["unified"])} if table["unified"].notna().any() else {}
    extra |= {"one threshold": column(table["pooled"])} if table["pooled"].notna().any() else {}
    extra["fit s"] = [short_number(pd.Series([value])) for value in table["fit_s"]]
    numbers = sorted(whole(some)["seed"].unique())
    seeds = f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    stand = some["stand"].iloc[0]
    said = (
        f"Image AUROC with the defaults, a model for each folder ({stand} pixels; {seeds} where a seed "
        f"matters); the means with a model for {FEW} training images of each, and with one model for all; all test "
        "images together, as one threshold meets them, with that model; seconds of a fit to about 300 images:"
    )
    texts.append(fill(said, 120))
    done = whole(some)
    columns = _per_folder(done, table.index, "auroc") | extra
    texts += side_by_side(table.index, columns, room=None)
    with_maps = done[done["aupro"].notna()]
    if not with_maps.empty:
        order = table.index[table.index.isin(with_maps["detector"])]
        texts += ["AUPRO, where there are masks:"]
        texts += side_by_side(order, _per_folder(with_maps, order, "aupro"), room=None)
    return "\n\n".join(texts)


def tables(rows: pd.DataFrame) -> str:
    """Return all tables in Markdown.

    Args:
        rows: As :func:`read_stands` gives them: those of the first stand are shown in full.

    Returns:
        What is held to a bar, a section for each part that has rows, and what failed.
    """
    rows = split_tasks(rows)
    first = rows[rows["stand"] == rows["stand"].iloc[0]]
    texts = [f"{rows['stand'].iloc[0]} pixels, seeds {', '.join(map(str, sorted(first['seed'].unique())))}."]
    texts += [*_in_short(first), *_bars(rows)]
    good = first[first["error"].isna()]
    for part, title in FOLDER_PARTS.items():
        for _, these in good[good["part"] == part].groupby("together", sort=False):
            texts += [f"### {title}", *_part(these)]
    for part, title in SMALL_PARTS.items():
        shown = _small_part(good[good["part"] == part])
        texts += [f"### {title}", *shown] if shown else []
    seeds = "mean over seeds ± standard deviation of that difference."
    bring = (
        ("rotations bring", f"With rotated images, where they fit − without, {seeds}", _without(UNTURNED)),
        (
            "kinds bring",
            f"A fit to each kind of normal image that is found − one fit to all, without rotations, {seeds}",
            _without(ONE_KIND),
        ),
        (
            "the memory bank brings",
            f"With a memory bank of normal positions − without, no rotations, {seeds}",
            _without(NO_BANK),
        ),
        ("the flow brings", f"Trained − untrained, {seeds}", TRAINED),
    )
    for title, said, pairs in bring:
        texts += _what_brings(title, said, pairs, first)
    texts += _stands(rows)
    failures = rows[rows["error"].notna()]
    if len(failures):
        which = {f"{row.detector} on {row.task} ({row.part})" for row in failures.itertuples()}
        texts.append(f"Failed: {'; '.join(sorted(which))}.")
    return "\n\n".join(texts) + "\n"


def read_stands(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the rows of some folders, one for each backbone and size.

    Raises:
        FileNotFoundError: If the first of them has none.
    """
    found = []
    for folder in folders:
        rows = read_rows(folder)
        if rows.empty:
            if folder == folders[0]:
                msg = f"There are no rows in {folder}: run the benchmark first."
                raise FileNotFoundError(msg)
            continue
        backbone, _, size = folder.name.rpartition("-")
        found.append(rows.assign(stand=f"{backbone}, {size}"))
    return pd.concat(found, ignore_index=True)


def write(folders: Sequence[Path], into: Sequence[Path] = ()) -> list[Path]:
    """Rebuild the tables.

    Args:
        folders: Of the rows, one for each backbone and size; the first is shown in full, and gets the tables.
        into: READMEs in whose markers the tables go, or the table of all folders alone. Beside the former the rows are
            written, too.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there are no rows, or a README is not there.
        ValueError: If a README has no markers.
    """
    rows = read_stands(folders)
    text = tables(rows)
    output = folders[0]
    (output / "tables.md").write_text(text, encoding="utf-8")
    written = [output / "tables.md"]
    parts = split_tasks(rows)
    short = all_sets(parts[parts["stand"] == parts["stand"].iloc[0]])
    for place in into:
        readme = place / "README.md" if place.is_dir() else place
        whole_page, sets_alone = put_between(readme, "suite", text), put_between(readme, SETS_MARKER, short)
        if whole_page:
            rows.to_csv(readme.with_name("results.csv"), index=False)
            written.append(readme.with_name("results.csv"))
        if not whole_page and not sets_alone:
            msg = f"{readme} has neither the marker <!-- suite: begin --> nor <!-- {SETS_MARKER}: begin -->."
            raise ValueError(msg)
        written.append(readme)
    return written
