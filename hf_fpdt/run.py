"""
Runs a script that does not import hf_fpdt, with hf_fpdt in its process:

    accelerate launch --config_file config.yaml -m hf_fpdt.run script.py --its --arguments
    accelerate launch --config_file config.yaml -m hf_fpdt.run -m package.module --its --arguments
"""

import os
import runpy
import sys

from .accelerate_wiring import enable


def main() -> None:
    """Runs what the command line names as `python` would."""
    words = sys.argv[1:]
    as_module = words[:1] == ["-m"]
    words = words[as_module:]
    if not words:
        raise SystemExit("usage: python -m hf_fpdt.run script.py [arguments], or python -m hf_fpdt.run -m module [arguments]")
    enable()
    sys.argv = words
    if as_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
