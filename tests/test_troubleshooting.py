"""
Every message that docs/troubleshooting.md has as a heading is one of hf_fpdt's, word for word, and a test holds one against
it. A failure: somebody searches the page for the error on the screen and does not find it, or finds one that no longer comes.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VALUE = "\0"  # what differs: `...` in a heading, `{...}` in the code
# Of torch and of Trainer.
OF_OTHERS = {"CUDA out of memory", "There were missing keys in the checkpoint model loaded: ['lm_head.weight']"}
HOLDERS = r"raises$|warns$|parametrize$|param$|^re\.|join$"  # calls that are given what a message should be
LENGTHS = (12, 20)  # characters that may tell one heading from all others


def messages_of(page: Path) -> list[str]:
    """The headings that are messages; a heading may have several of them, each in backticks."""
    lines = re.findall(r"^### (`.*)$", page.read_text(), flags=re.M)
    found = [message for line in lines for message in re.findall(r"`([^`]+)`", line)]
    return [message for message in found if message not in OF_OTHERS]


HEADINGS = messages_of(ROOT / "docs" / "troubleshooting.md")


def text_of(node: ast.AST) -> str | None:
    """The text of a string, an f-string or a sum of them, with `VALUE` for what is filled in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [text_of(node.left), text_of(node.right)]
        return None if sides == [None, None] else "".join(VALUE if side is None else side for side in sides)
    return None


def strings_of(file: Path) -> list[str]:
    """All strings of a file, without documentation."""
    tree = ast.parse(file.read_text())
    bodies = [node.body for node in ast.walk(tree) if hasattr(node, "body") and isinstance(node.body, list)]
    bare = {id(line.value) for body in bodies for line in body if isinstance(line, ast.Expr)}
    texts = (text_of(node) for node in ast.walk(tree) if id(node) not in bare)
    return [text for text in texts if text is not None]


@cache
def messages_of_the_code() -> list[str]:
    """The strings of hf_fpdt, and those into which another string of the same file may be filled."""
    found = set()
    for file in (ROOT / "hf_fpdt").glob("*.py"):
        strings = {re.sub(r"%[sd]", VALUE, text).replace("\n", " ") for text in strings_of(file)}
        found |= strings
        for text in strings:
            pieces = text.split(VALUE)
            for at in range(1, len(pieces)):
                before, after = VALUE.join(pieces[:at]), VALUE.join(pieces[at:])
                found |= {before + filled + after for filled in strings}
    return sorted(found)


@cache
def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z_]{3,}", text))


def fits(heading: str, message: str) -> bool:
    """
    Whether a message of the code has the heading in it: `...` may stand for any part of the message, and what is filled into
    the message for one word of the heading.
    """
    if len(words_of(heading) & words_of(message)) <= len(words_of(heading)) // 2:
        return False  # a message of values alone
    places = set(range(len(message) + 1))
    for letter in heading.replace("...", VALUE):
        if letter == VALUE:
            places = set(range(min(places), len(message) + 1))
        else:
            inside = [place for place in places if place < len(message)]
            after = {place + 1 for place in inside if message[place] == letter}
            places = after | {place for place in inside if message[place] == VALUE and letter != " "}
        places |= {place + 1 for place in places if message[place : place + 1] == VALUE}
        if not places:
            return False
    return True


def marks_of(heading: str) -> set[str]:
    """The shortest runs of a heading's text by which a test can mean no other heading."""
    pieces = heading.split("...")
    runs = {piece[at : at + length] for length in LENGTHS for piece in pieces for at in range(len(piece) - length + 1)}
    others = [other for other in HEADINGS if other != heading]
    own = {run for run in runs if not any(run in other for other in others)}
    return own or {piece for piece in pieces if len(piece) > 3}


def looked_for(tree: ast.AST) -> list[str]:
    """
    The strings of a test file that a message may be held against: in `match=`, in an assertion, among the values of parameters,
    in a table or under a name. Documentation, arguments of other calls and what a test raises itself are none.
    """
    text = text_of(tree)
    found = [] if text is None else [text]
    for node in ast.iter_child_nodes(tree):
        argument = isinstance(tree, ast.Call) and node is not tree.func and not re.search(HOLDERS, ast.unparse(tree.func))
        documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (argument or documentation or isinstance(node, ast.Raise)):
            found += looked_for(node)
    return found


@cache
def texts_of_the_tests() -> str:
    """What the tests look for, with the escapes of patterns taken out. Those of GPUs count: they have messages of their own."""
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    texts = {text for file in files for text in looked_for(ast.parse(file.read_text()))}
    return "\n".join(sorted(re.sub(r"\\(.)", r"\1", text).replace("\n", " ") for text in texts))


def test_there_are_some():
    assert len(HEADINGS) > 80
    assert len(set(HEADINGS)) == len(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_a_message(heading):
    assert any(fits(heading, message) for message in messages_of_the_code())


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_tested(heading):
    assert any(mark in texts_of_the_tests() for mark in marks_of(heading)), sorted(marks_of(heading))


@pytest.mark.parametrize(
    "heading",
    [
        "sp_size=... does not fit the ... processes.",
        'FPDTConfig(chunk_sizes=...): chunk_size must be "auto" or a whole number of bytes, at most 1.',
        "FPDTConfig(kv='streamed', offload='none'): K and V stream from a disk",
        "labels have ... tokens and the hidden states ...; they must agree.",
        "... computes its logits in parts: ...",
    ],
)
def test_a_heading_that_drifted_is_found(heading):
    assert not any(fits(heading, message) for message in messages_of_the_code())


def test_a_heading_without_a_test_is_found():
    heading = "... heads wandered off to ..."
    assert not any(mark in texts_of_the_tests() for mark in marks_of(heading))


def test_what_a_test_looks_for():
    text = "with raises(ValueError, match='one'):\n  'two'\n  give('three')\n  raise OSError('four')\nassert 'five' in said"
    assert looked_for(ast.parse(text)) == ["one", "five"]
