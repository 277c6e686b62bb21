"""How `make docs` builds these pages: Markdown as GitHub shows it, any broken link or anchor is an error."""

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
html_copy_source = False
html_show_sphinx = False
