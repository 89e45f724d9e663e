"""Pages as the tests read them."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, ids and visible text of a page; unclosed or crossed tags, and ids that are there twice, are errors."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        targets = {value[1:] for name, value in self.attributes if name == "href" and value and value.startswith("#")}
        assert targets <= set(ids)

    @property
    def visible(self) -> str:
        """The text without its line breaks."""
        return " ".join(" ".join(self.text).split())

    def assert_stands_alone(self) -> None:
        """No script, nothing loaded from elsewhere, no link that leads away."""
        assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(self.tags)
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        links = [value or "" for name, value in self.attributes if name in ("src", "href", "xlink:href")]
        assert links
        assert all(value.startswith("#") for value in links)
        assert not re.search(r"@import|url\(\s*['\"]?(?!#)", self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
