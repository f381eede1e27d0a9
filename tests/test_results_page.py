"""
docs/results.md has the tables that its result files make, and the pictures that it shows are there. A failure: run
`python -m benchmarks.paper.page`.
"""

import re

from benchmarks.paper import page


def test_the_page_is_what_the_results_say():
    text = page.PAGE.read_text()
    assert page.filled(text) == text


def test_its_pictures_are_there():
    shown = re.findall(r"images/paper_(\w+)_h100\.png", page.PAGE.read_text())
    assert sorted(shown) == ["ablations", "anatomy", "convergence", "efficiency", "quality"]
    assert all(page._image(name).is_file() for name in shown)
