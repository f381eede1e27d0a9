"""
The package's own rules, read from its syntax trees: layers that import downwards only, short functions and modules, no optional
dependency at import.

A failure means a module that knows more than it should, or `import hf_fpdt` failing on a machine without some engine.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fpdt

PACKAGE = Path(hf_fpdt.__file__).parent
# A module imports only modules of strictly lower levels.
LAYERS = {
    "version": 0, "config": 0, "chunking": 0, "documents": 0, "online_softmax": 0, "gradient_sum": 0, "run_state": 0,
    "host_limits": 0, "instance_forward": 0, "attention_kernels": 0, "cross_entropy": 0, "footprint": 0, "sole_owner": 0,
    "rates": 0, "engine_memory": 0, "link_rate": 0, "operations": 1, "step_time": 3, "bench": 3,
    "free_list": 0, "nameless_file": 0, "unchanged": 0, "numa": 0, "global_loss": 0,
    "work": 0, "flops": 0, "timeline": 0, "engines": 0, "head_split": 0, "head_exchange": 1, "group_agreement": 0,
    "host_arena": 1, "group_loss": 1, "input_checks": 1, "step_trace": 1, "kernel_memory": 1, "copy_meter": 1,
    "optimizer_states": 1, "trainer_optimizer": 2,
    "deferred_logits": 1, "causal_attention": 1, "cuda_kernels": 1, "token_stream": 1, "chunked_loss": 1, "sequence_layout": 1,
    "transfers": 2, "plugin": 2, "kernel_choice": 2, "model_loss": 2, "memory_model": 2, "disk_file": 2, "batch_sharding": 2,
    "shard_checks": 2,
    "environment": 3, "key_value_store": 3, "placement": 3, "step_plan": 4, "places": 3, "sharded_loader": 3, "watch": 3,
    "layer_chunk": 4, "trainer_import": 4,
    "layer_stream": 5, "layer_footprint": 5,
    "streamed_pass": 6,
    "attention_interface": 7, "layer_wiring": 7, "model_plan": 7,
    "modeling": 8,
    "planning": 9, "accelerate_wiring": 9,
    "run": 10, "plan_report": 10, "__init__": 10,
    "cli": 11,
}  # fmt: skip
# The only imports inside of functions: packages that may not be installed, and Trainer, which takes seconds.
LAZY = {
    ("cuda_kernels", "flash_attn"),
    ("engines", "deepspeed"),
    ("__init__", ""),
    ("plan_report", "matplotlib"),
    ("timeline", "matplotlib"),
    ("cli", "peft"),
    ("trainer_import", ""),
}
MAX_FUNCTION_LINES, MAX_MODULE_LINES, MAX_PUBLIC_NAMES = 60, 350, 9

TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py"))}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def imports(node: ast.AST) -> list[str]:
    """Names of the modules imported below a node; relative ones start with a dot."""
    names = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.level and not child.module:
            names += ["." * child.level + alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            names.append("." * child.level + (child.module or ""))
    return names


def own_imports(module: str) -> set[str]:
    names = imports(TREES[module])
    assert not [name for name in names if name == "hf_fpdt" or name.startswith("hf_fpdt.")], "imports of its own are relative"
    return {name.lstrip(".").split(".")[0] for name in names if name.startswith(".")}


def test_every_module_has_a_layer():
    assert set(LAYERS) == set(TREES)
    assert not [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]


@pytest.mark.parametrize("module", sorted(TREES))
def test_imports_go_down(module):
    bad = [name for name in own_imports(module) if LAYERS[name] >= LAYERS[module]]
    assert not bad, f"{module} (layer {LAYERS[module]}) imports {[(name, LAYERS[name]) for name in bad]}"


def test_layers_are_as_low_as_can_be():
    """So that the table says something: a module's layer is not above what it imports without a reason."""
    for module in TREES:
        below = max((LAYERS[name] for name in own_imports(module)), default=-1)
        assert LAYERS[module] == below + 1 or module in {"attention_interface", "modeling", "__init__"}, module


def test_no_cycles():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module in done:
            return
        path.append(module)
        for name in own_imports(module):
            visit(name)
        path.pop()
        done.add(module)

    for module in TREES:
        visit(module)
    assert done == set(TREES)


@pytest.mark.parametrize("module", sorted(TREES))
def test_imports_are_at_the_top(module):
    lazy = {
        (module, name.split(".")[0])
        for node in ast.walk(TREES[module])
        if isinstance(node, FUNCTIONS)
        for name in imports(node)
    }
    assert lazy <= LAZY


def test_optional_packages_have_one_importer():
    top = {module: {name.split(".")[0] for name in imports(tree) if not name.startswith(".")} for module, tree in TREES.items()}
    allowed = {"flash_attn": {"cuda_kernels"}, "triton": {"cross_entropy"}, "deepspeed": {"engines"}, "peft": {"cli"}}
    for package in ("flash_attn", "triton", "deepspeed", "peft", "datasets"):
        importers = allowed.get(package, set())
        assert {module for module in top if package in top[module]} == importers
    without_transformers = {module for module in top if LAYERS[module] <= 1} - {"input_checks", "deferred_logits"}
    assert not {module for module in without_transformers if "transformers" in top[module]}


@pytest.mark.parametrize("module", sorted(TREES))
def test_lengths(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_MODULE_LINES
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, FUNCTIONS[:2])]
    too_long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    too_long = {name: length for name, length in too_long.items() if length > MAX_FUNCTION_LINES}
    assert not too_long


@pytest.mark.parametrize("module", sorted(TREES))
def test_modules_say_what_they_are(module):
    if module != "version":
        assert ast.get_docstring(TREES[module])
    assert (PACKAGE / f"{module}.py").read_bytes().isascii()


def test_public_surface():
    assert len(hf_fpdt.__all__) <= MAX_PUBLIC_NAMES
    assert len(set(hf_fpdt.__all__)) == len(hf_fpdt.__all__)


def test_import_is_light():
    """`import hf_fpdt` adds no optional package to what transformers' models import by themselves."""
    code = """
import json, sys
import torch, transformers.modeling_utils, transformers.integrations.sdpa_attention
before = set(sys.modules)
import hf_fpdt
print(json.dumps([sorted(set(sys.modules) - before), "torch.distributed.fsdp" in sys.modules]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    added, _ = json.loads(result.stdout.strip().splitlines()[-1])
    roots = {name.split(".")[0] for name in added}
    assert "hf_fpdt" in roots
    assert not roots & {"deepspeed", "flash_attn", "peft", "datasets", "liger_kernel", "matplotlib"}
    assert not [name for name in added if name.startswith(("torch.distributed", "transformers.integrations.deepspeed"))]


def test_import_without_optional_packages():
    """With every optional package hidden, the import and a streamed step work."""
    code = """
import sys
for name in ("deepspeed", "flash_attn", "peft", "datasets", "liger_kernel", "matplotlib"):
    sys.modules[name] = None
import torch, hf_fpdt
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = hf_fpdt.apply_fpdt(LlamaForCausalLM(config).train(), hf_fpdt.FPDTConfig(chunk_size=4))
ids = torch.arange(10)[None]
model(input_ids=ids, labels=ids).loss.backward()
print("steps", model.config._attn_implementation)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["steps", "fpdt"]
