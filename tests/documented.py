"""
Command lines as the documentation has them, and as they can be tried: with tiny models and files for its placeholders, by a
reader who has installed the package and stands in a folder with the examples.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import started

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "examples/README.md", "docs/launching.md", "docs/watching.md", "docs/settings.md")
PROGRAMS = {"accelerate", "bash", "hf-fpdt", "python"}
SOURCES = ("hf_fpdt", "examples", "accelerate_configs", "pyproject.toml", "README.md", "LICENSE")
ON_CPUS = {"fpdt_zero3_2gpu": "fpdt_zero3_2cpu"}


@cache
def commands() -> dict[str, list[str]]:
    """Words of every command that starts one of `PROGRAMS`, without variables in front, by its page and text."""
    found = {}
    for page in PAGES:
        for language, block in re.findall(r"^```(.*?)\n(.*?)^```", (ROOT / page).read_text(), flags=re.S | re.M):
            for words in _lines(block) if language in ("", "bash") else []:
                while words and re.fullmatch(r"[A-Z_]+=.*|\$", words[0]):
                    words = words[1:]
                if words and words[0] in PROGRAMS:
                    found[f"{page}: {' '.join(words)}"] = words
    return found


def _lines(block: str) -> list[list[str]]:
    block = re.sub(r"\s+# .*", "", block.replace("\\\n", " "))
    lexer = shlex.shlex(block, posix=True, punctuation_chars="\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    lines: list[list[str]] = [[]]
    for word in lexer:
        if set(word) == {"\n"}:
            lines.append([])
        else:
            lines[-1].append(word)
    return lines


def command(page: str, start: str) -> list[str]:
    """The one command of a page that starts so."""
    (words,) = (words for text, words in commands().items() if text.startswith(f"{page}: {start}"))
    return words


def as_tried(words: list[str], names: dict[str, object]) -> list[str]:
    """The same command, with other words for the documentation's placeholders and the configuration for CPUs."""
    assert not set(names) - set(words), set(names) - set(words)
    words = [str(names.get(word, word)) for word in words]
    for name, on_cpus in ON_CPUS.items():
        words = [word.replace(name, on_cpus) for word in words]
    if words[:2] == ["accelerate", "launch"] and "--main_process_port" not in words:
        words[2:2] = ["--main_process_port", "0"]  # any that is free
    return words


class Reader:
    """
    Somebody who has followed the README: hf_fpdt was installed from a copy of the checkout into a new virtual environment, to
    which the one that the tests run in lends everything else. In `folder` is what the copy has besides.
    """

    def __init__(self, folder: Path):
        self.folder, environment = folder / "checkout", folder / "venv"
        ignored = shutil.ignore_patterns("__pycache__")
        for name in SOURCES:
            source, target = ROOT / name, self.folder / name
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)
        venv.create(environment, symlinks=True)
        self.programs = environment / "bin"
        (site,) = environment.glob("lib/python*/site-packages")
        borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (site / "borrowed.pth").write_text("\n".join(borrowed))
        install = f"-m pip --python {self.programs / 'python'} install --quiet --no-index --no-deps --no-build-isolation"
        subprocess.run([sys.executable, *install.split(), str(self.folder)], check=True, timeout=100)
        for name in ("hf_fpdt", "hf_fpdt.egg-info", "build"):  # what runs is what was installed
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.forked = folder / "forked"
        self.forked.mkdir()
        started.write_program(self.forked / "python", self.programs / "python", started.server()[0])
        for programs in (self.programs, self.forked):
            accelerate = programs / "accelerate"  # as pip would have made it
            accelerate.write_text(f'#!/bin/sh\nexec "{programs}/python" -m accelerate.commands.accelerate_cli "$@"\n')
            accelerate.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        """Without GPUs, settings of hf_fpdt and the paths of whoever runs the tests."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith("FPDT_")}
        paths = [path for path in mine.pop("PYTHONPATH", "").split(os.pathsep) if path and ROOT not in Path(path, "_").parents]
        fixed = {"PATH": f"{self.programs}{os.pathsep}{mine['PATH']}", "PYTHONPATH": os.pathsep.join(paths)}
        return mine | fixed | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables

    def run(self, words: list[str], fresh: bool = False, **variables: str) -> str:
        """Runs a command to its good end; what it printed. Python's commands are forked as in `started.py`, unless `fresh`."""
        words, variables = list(map(str, words)), self.environment(**variables)
        if not fresh:
            variables["PATH"] = f"{self.forked}{os.pathsep}{variables['PATH']}"
        done = started.run(words, env=variables, cwd=self.folder, timeout=280, fresh=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
