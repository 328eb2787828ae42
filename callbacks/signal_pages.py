"""Links between the pages that show the rollouts of a run's epochs."""

from __future__ import annotations

import re
from pathlib import Path

from .signal_picture import STYLE

NAV, TITLE = re.compile(r"<nav>.*?</nav>"), re.compile(r"<title>(.*?)</title>")


def page_path(folder: Path, epoch: int) -> Path:
    """The page of an epoch, counted from 1."""
    return folder / f"epoch-{epoch}.html"


def link_pages(folder: Path, epoch: int) -> None:
    """Links a new page with the pages before and after it, and lists all pages in `index.html`.

    Args:
        folder: Folder of the pages.
        epoch: Epoch of the new page, counted from 1.
    """
    names = (re.fullmatch(r"epoch-(\d+)\.html", path.name) for path in folder.iterdir())
    epochs = sorted(int(name[1]) for name in names if name)
    here = epochs.index(epoch)
    for i in range(max(here - 1, 0), min(here + 2, len(epochs))):
        path = page_path(folder, epochs[i])
        before, after = epochs[max(i - 1, 0) : i], epochs[i + 1 : i + 2]
        nav = " · ".join([*(_link(e, f"← epoch {e}") for e in before), '<a href="index.html">all epochs</a>'])
        nav = " · ".join([nav, *(_link(e, f"epoch {e} →") for e in after)])
        path.write_text(NAV.sub(f"<nav>{nav}</nav>", path.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    rows = "".join(f"<li>{_link(e, _title(page_path(folder, e)))}</li>\n" for e in epochs)
    (folder / "index.html").write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Signal of each epoch</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Signal of each epoch</h1>\n<ul>\n{rows}</ul>\n</body></html>\n",
        encoding="utf-8",
    )


def _link(epoch: int, text: str) -> str:
    return f'<a href="epoch-{epoch}.html">{text}</a>'


def _title(page: Path) -> str:
    """The title of a page, with its escapes."""
    with page.open(encoding="utf-8") as file:
        found = TITLE.search(file.read(500))
    return found[1] if found else page.stem
