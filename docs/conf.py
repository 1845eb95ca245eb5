"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a checkout needs no installation

import fipoptim  # noqa: E402

project = "fipoptim"
author = "fipoptim contributors"
copyright = "fipoptim contributors"
version = release = fipoptim.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

# Markdown: mathematics between dollars, and links to headings as on GitHub.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

# The reference is written in the docstrings. Types stay in the signatures, where they are short.
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# A reference to a name of this library must resolve. Names of torch and Python are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!fipoptim\b).*")]

html_theme = "furo"
html_title = f"fipoptim {release}"
html_copy_source = False
html_theme_options = {"navigation_with_keys": False}
copybutton_prompt_text = "$ "
