"""Checks a built site: its internal links lead somewhere, and reading it needs no network.

python docs/check_site.py docs/_build/html
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Elements whose address the browser loads by itself, and the attributes that have it.
LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The anchors of a page, the addresses it links to, and those it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values[name] or "" for name in ("id", "name") if name in values}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")
        if values.get(LOADED.get(tag, "")):
            self.loaded.append(values[LOADED[tag]] or "")


def problems(site: Path) -> Iterator[str]:
    """What is wrong with the site, a line each."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for address in page.loaded:
            if urlsplit(address).netloc:
                yield f"{name} loads {address}"
        for address in page.links + page.loaded:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{name} links to {address}, which does not exist"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links to {address}, and that page has no such place"
    for path in site.rglob("*.css"):
        for address in re.findall(
            r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", path.read_text()
        ):
            yield f"{path.relative_to(site)} loads {address}"


if __name__ == "__main__":
    found = [*problems(Path(sys.argv[1]))]
    print("\n".join(found) or "every link of the site leads somewhere, and it loads nothing else")
    sys.exit(bool(found))
