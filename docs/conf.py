"""How `make docs` builds these pages: Markdown as GitHub shows it, any broken link or anchor is an error."""

import re
from pathlib import Path

from sphinx.application import Sphinx

from seawall import __version__

project = "Seawall"
author = "Seawall contributors"
version = release = __version__
copyright = author  # noqa: A001  # the name that Sphinx reads; a year would make two builds differ

extensions = ["myst_parser"]
exclude_patterns = ["build"]
myst_heading_anchors = 4  # `page.md#a-heading` as on GitHub, and checked
nitpicky = True

html_theme = "furo"
html_title = f"Seawall {__version__}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    app.connect("source-read", _stay_in_the_site)


def _stay_in_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead to the pages that include CHANGELOG.md and SECURITY.md, where GitHub leads to those themselves. A directory,
    which GitHub lists, is no page: its name has to do."""
    here = (Path(app.srcdir) / page).parent

    def kept(found: re.Match[str]) -> str:
        text, target = found.groups()
        if target.endswith(("/CHANGELOG.md", "/SECURITY.md")):
            return f"[{text}](/{Path(target).stem.lower()}.md)"
        return text if (here / target).is_dir() else found[0]

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", kept, source[0])
