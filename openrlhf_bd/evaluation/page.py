"""Templates of the pages: nothing is loaded from elsewhere, no script runs, and every text is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from openrlhf_bd.evaluation.figures import to_svg

# What HTML does not allow as a character: controls, lone surrogates, noncharacters. Models do sample them.
_NOT_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def render(template: str, page: Mapping[str, Any]) -> str:
    """A page from its template, with a replacement character for each that HTML does not allow."""
    return _NOT_HTML.sub("\ufffd", _environment().get_template(template).render(page))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("openrlhf_bd", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # What to_svg returns is drawn here, its texts escaped by matplotlib: the only markup that is not escaped again.
    environment.filters["svg"] = lambda drawing: Markup(to_svg(drawing))
    return environment
