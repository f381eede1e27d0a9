"""
What the code never does, in the library, the examples and the benchmarks: run text as code, load files that can, or fetch
anything by itself; the library starts no programs either. And pyproject.toml names the oldest release of all that it asks for.
A failure: a file that somebody was given runs code, a machine is asked for something behind its user's back, or an installation
takes a release that is too old.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("hf_fpdt", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NETWORK = {"urllib", "http", "ftplib", "socket", "requests", "httpx", "aiohttp", "huggingface_hub"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load"}


def dangers(text: str) -> list[str]:
    """Every place, with its line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        bad = [name for name in names if name.split(".")[0] in MODULES | NETWORK or name in CALLS]
        if isinstance(node, ast.Call):
            bad += dangers_of_call(node)
        found += [f"line {node.lineno}: {name}" for name in bad]
    return found


def dangers_of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    found = [name] if name in CALLS or name.startswith("torch.hub.") else []
    if name == "torch.load" and given.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    return found + [key for key in ("shell", "trust_remote_code") if given.get(key, "False") != "False"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_runs_text_as_code_or_fetches_it(file):
    assert dangers(file.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import joblib.numpy_pickle", "eval('1')", "exec(text)", "os.system(line)",
        "from os import system", "subprocess.run(line, shell=True)", "torch.load(file)", "torch.load(file, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "AutoConfig.from_pretrained(name, trust_remote_code=given)",
        "yaml.load(text, Loader=Loader)", "from yaml import load", "import urllib.request", "from huggingface_hub import login",
        "torch.hub.load_state_dict_from_url(url)",
    ],
)  # fmt: skip
def test_what_would_is_found(text):
    assert len(dangers(text)) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "re.compile('a')",
        "torch.load(file, weights_only=True)",
        "yaml.safe_load(text)",
        "run(line, shell=False)",
    ],
)
def test_what_does_not_is_left_alone(text):
    assert dangers(text) == []


def test_the_library_starts_no_programs():
    files = [file for file in FILES if file.parent.name == "hf_fpdt"]
    assert len(files) > 30
    assert [file.name for file in files if re.search(r"\bsubprocess\b|os\.(exec|spawn|posix_spawn)", file.read_text())] == []


def requirements() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    project = re.search(r"^dependencies = .*?\[project\.scripts\]", text, flags=re.S | re.M)[0]
    lists = re.findall(r"^[\w-]+ = \[(.*?)\]$", project, flags=re.S | re.M)
    return [requirement for each in lists for requirement in re.findall(r'"([^"]+)"', each)]


def test_requirements_say_from_which_release_on():
    found = [name for name in requirements() if not name.startswith("hf-fpdt[")]
    assert len(found) > 15
    assert [name for name in found if not re.match(r"[\w.-]+(\[[\w,]+\])?(>=|==)\d", name)] == []
