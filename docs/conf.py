"""Sphinx: Markdown pages by MyST, API pages from docstrings."""

import importlib.metadata
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "lopt"
author = "The lopt founders"
copyright = author
release = importlib.metadata.version("lopt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "pages",
]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings put code between single backticks
myst_heading_anchors = 2  # links may point at headings
myst_enable_extensions = ["dollarmath"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = ["Reference", "Returns"]  # as prose

html_theme = "furo"
html_title = "lopt"

# Autodoc spells out aliases; these are the words of lopt.core.types.
WORDS = {
    "~jaxtyping.": "",
    "jaxtyping.": "",
    "~jax.jaxlib._jax.Array": "Array",
    "~jaxlib._jax.Array": "Array",
    "jaxlib._jax.Array": "Array",
    "_column ...": "column ...",
    "Key[Array, ''] | UInt32[Array, '2'] | UInt32[Array, '4']": "Key",
    "PyTree[Float[Array, '...']]": "Params",
    "Float[Array, '']": "Scalar",
}


def shorten(app, what, name, obj, options, signature, returned):
    """Puts the aliases back into a signature."""

    def replace(text):
        for long, short in WORDS.items():
            text = text and text.replace(long, short)
        return text

    return replace(signature), replace(returned)


def escape_bars(app, what, name, obj, options, lines):
    """Lets |u| be an absolute value, and not a substitution."""
    lines[:] = [line if ">>>" in line else re.sub(r"(?<!`)\|(?!`)", r"\\|", line) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-signature", shorten)
