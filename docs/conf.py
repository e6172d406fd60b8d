"""Sphinx: Markdown pages by MyST, API pages from docstrings."""

import importlib.metadata

project = "lopt"
author = "The lopt founders"
copyright = author
release = importlib.metadata.version("lopt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings put code between single backticks
myst_heading_anchors = 2  # links may point at headings
myst_enable_extensions = ["dollarmath"]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_custom_sections = ["Reference"]

html_theme = "furo"
html_title = "lopt"
