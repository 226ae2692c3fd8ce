"""Formulas: ```math blocks and $`...`$ become MathML when the pages are built, as on GitHub."""

import re
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """The page with its formulas as MathML, which browsers render by themselves."""
    blocks = re.sub(
        r"^```math\n(.+?)\n```$",
        lambda found: convert(found[1], display="block"),
        markdown,
        flags=re.DOTALL | re.MULTILINE,
    )
    return re.sub(r"\$`([^`]+)`\$", lambda found: f"<span>{convert(found[1])}</span>", blocks)
