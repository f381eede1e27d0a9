"""
docs/api.md is made of the docstrings of the public names; `PYTHONPATH=tests python tests/test_api_reference.py` writes it. A
failure means that it is not what the code says.
"""

import inspect
from pathlib import Path

import hf_fpdt

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# API reference

The public names of `hf_fpdt`, from their docstrings
([tests/test_api_reference.py](../tests/test_api_reference.py) writes this page). The command is `hf-fpdt --help`; what may be
set from a launch configuration or the environment is in [launching.md](launching.md#settings).
"""


def page() -> str:
    names = sorted(name for name in hf_fpdt.__all__ if name != "__version__")
    return HEAD + "".join(_section(name, getattr(hf_fpdt, name)) for name in names)


def _section(name: str, thing) -> str:
    kind = "exception" if inspect.isclass(thing) and issubclass(thing, Exception) else "class" if inspect.isclass(thing) else ""
    call = name if kind == "exception" else f"{name}({_parameters(thing)})"
    bases = f", a `{thing.__bases__[0].__name__}`" if kind == "exception" else ""
    lines = _marked_up(inspect.getdoc(thing))
    return f"\n## {name}\n\n`{call}`{bases}\n\n{lines}\n"


def _parameters(thing) -> str:
    """Without annotations, which every Python prints in its own way."""
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in inspect.signature(thing).parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def _marked_up(text: str) -> str:
    """Sections in bold, the arguments below `Args:` as lists; examples are in markdown already."""
    lines, listed = [], False
    for line in text.splitlines():
        if line in ("Args:", "Returns:", "Raises:", "Example:"):
            listed = line in ("Args:", "Raises:")
            lines += [f"**{line}**", ""]
        elif listed and line.startswith("    ") and not line.startswith("     "):
            lines.append(f"* {line.strip()}")
        elif listed and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == page()
    assert all(f"\n## {name}\n" in PAGE.read_text() for name in hf_fpdt.__all__ if name != "__version__")


if __name__ == "__main__":
    PAGE.write_text(page())
