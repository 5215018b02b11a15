"""What the pages of all commands share: one frame, one style sheet, charts, numbers and pictures in the page itself.

page(package, template, content)       the page as HTML that needs no other file
plots                                  charts as inline SVG in the colours of the page
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

import jinja2

MINUS = "\N{MINUS SIGN}"


def page(package: str, template: str, content: Mapping[str, Any], filters: Mapping[str, Any] | None = None) -> str:
    """Return a page as HTML that needs no other file: style, script, charts and pictures are in it.

    Args:
        package: whose folder templates/ holds the template, e.g. "diffalign.evaluation".
        template: extends frame.html.j2.
        content: what the template names.
        filters: further ones it uses; "percent" and "position" of shares are there.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package), jinja2.PackageLoader("diffalign.webpages", package_path="")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "position": lambda share: f"{100 * share:.2f}%"} | dict(filters or {})
    environment.tests["missing"] = math.isnan
    return environment.get_template(template).render(content)


def data_uri(content: bytes, kind: str) -> str:
    """Return encoded content as what an address may be; `kind` is e.g. "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _percent(share: float, decimals: int = 1) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:.{decimals}f}%"
