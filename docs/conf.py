"""Settings of the documentation: `sphinx-build -W -b html docs docs/_build`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlrt_lightning import __version__

project = "rlrt_lightning"
release = __version__
copyright = "the rlrt_lightning authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rlrt_lightning"
myst_heading_anchors = 3  # links such as [...](page.md#a-heading)
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # docstrings mark code by single backticks
