"""Command lines as the documentation has them, and as they can be tried: with tiny models and files for its placeholders."""

import re
import shlex
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "examples/README.md", "docs/launching.md", "docs/watching.md", "docs/settings.md")
PROGRAMS = {
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    "hf-fpdt": [sys.executable, "-m", "hf_fpdt.cli"],
    "python": [sys.executable],
}
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
    return [*PROGRAMS[words[0]], *words[1:]]
