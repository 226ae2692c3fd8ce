"""Formulas and long names: what becomes of them when the pages are built.

```math blocks and $`...`$ become MathML, as on GitHub.
"""

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


def on_page_content(html: str, **kwargs: Any) -> str:
    """The page with places in long names, after dots and the like, where lines may break.

    Lines of blocks and numbers stay whole.
    """
    html = re.sub(r"(?<=\de-)(?=\d+</td>)", "&NoBreak;", html)
    return re.sub(
        r"<pre.*?</pre>|(?<=<code>)[^<]{20,}(?=</code>)",
        lambda found: (
            found[0]
            if found[0].startswith("<pre")
            else re.sub(r"(?<=[.(/])(?=\D)", "<wbr>", found[0])
        ),
        html,
        flags=re.DOTALL,
    )
