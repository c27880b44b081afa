"""Sphinx: `sphinx-build -W -b html docs build/docs`."""

import saeopt

project, author = "saeopt", "The saeopt authors"
copyright = "2026, The saeopt authors"
release = version = saeopt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"saeopt {version}"
html_show_sourcelink = False
html_static_path, html_css_files = ["_static"], ["site.css"]
myst_heading_anchors = 3
default_role = "code"  # a docstring's `name` is code
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
linkcheck_anchors = False
