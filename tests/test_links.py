# SPDX-License-Identifier: Apache-2.0
"""Links between Markdown files and notebooks, and to headings in them; `make docs` lets mkdocs check them again."""

import json
import re
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "benchmarks", "anomalib_flowood", "notebooks")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in chain(
        ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in FOLDERS), ROOT.glob("notebooks/*.ipynb")
    )
)
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")


@cache
def text_of(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return _FENCE.sub("", text)


def slug(heading: str) -> str:
    """As GitHub makes an anchor of a heading."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


@cache
def anchors(page: str) -> set[str]:
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text_of(page), re.MULTILINE):
        name = slug(heading)
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def broken(page: str, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in _LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (anchor and anchor not in anchors(target.relative_to(ROOT).as_posix()))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    assert not broken(page, text_of(page))


def test_what_is_broken_is_found():
    text = "[a](nowhere.md) [b](docs/export.md#not-there) [c](docs/export.md#the-check) [d](#use-it) [e](#no) [f](../x)"
    assert broken("README.md", text) == ["nowhere.md", "docs/export.md#not-there", "#no", "../x"]
    assert slug("Why `EmbeddingFlow` has no *second* score") == "why-embeddingflow-has-no-second-score"


def test_the_site_has_every_page():
    def pages(nav):
        for item in nav:
            value = next(iter(item.values())) if isinstance(item, dict) else item
            yield from pages(value) if isinstance(value, list) else [value]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    # Where notebooks are Markdown.
    assert sorted(pages(site["nav"])) == sorted(page.replace(".ipynb", ".md") for page in PAGES)


def test_the_site_has_what_its_pages_lead_to():
    """`make docs` copies these endings; a link to a file of Python is broken there."""
    copied = re.findall(r"'\*(\.\w+)'", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert ".md" in copied
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", text_of(page))
        targets = {link.partition("#")[0] for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link)}
        assert {suffix for target in targets if (suffix := Path(target).suffix)} <= {*copied}, page


def test_pages_of_docstrings_name_what_there_is():
    """Modules are files; what is in them is defined there by name."""
    names = re.findall(r"^::: (\S+)$", "\n".join(text_of(page) for page in PAGES if "/api/" in page), re.MULTILINE)
    assert names
    for name in names:
        module = ROOT / (name.replace(".", "/") + ".py")
        if not module.exists():
            parent, _, member = name.rpartition(".")
            source = (ROOT / (parent.replace(".", "/") + ".py")).read_text(encoding="utf-8")
            assert re.search(rf"^(class|def) {member}\b", source, re.MULTILINE), name


def test_links_to_pages_of_docstrings_find_there_what_they_name():
    """A class by its name, or by the words that it is made of: a shrunk Gaussian is `ShrunkGaussian`."""
    named = [
        (page, shown, (ROOT / page).parent / target)
        for page in PAGES
        for shown, target in re.findall(r"\[([^\]]*)\]\(([^)#\s]*api/\w+\.md)\)", text_of(page))
    ]
    assert named
    for page, shown, target in named:
        name = re.sub(r"(?:^| )(\w)", lambda found: found[1].upper(), shown.strip("`"))
        modules = re.findall(r"^::: (\S+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        files = [ROOT / (module.replace(".", "/") + ".py") for module in modules]
        source = "".join(file.read_text(encoding="utf-8") for file in files if file.exists())
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), f"{page}: {shown}"
