"""The documentation as a website: `make docs`. Its pages are read on a code host as well, so they are plain markdown."""

project = "hf_fpdt"
author = "the hf_fpdt contributors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "hf_fpdt"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
# Pages link to files of the repository, which are no pages.
suppress_warnings = ["myst.xref_missing"]
