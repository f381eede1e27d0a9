"""
torch's stream sanitizer over whole steps: it follows every read and write of device memory, and reports two on different
streams that no event orders. A failure means a race that the tests with slow copies did not happen to hit.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

STEPS = """
import sys, torch, hf_fpdt
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, use_cache=False)
model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
disk = {"offload": "disk", "disk_folder": sys.argv[1], "host_memory": 8 << 20}
host = {"offload": "host"}
for settings in ({}, host, {**host, "save_attention": False}, {**host, "kv": "streamed"}, disk):
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=96, kernel="naive", **settings))
    ids = torch.randint(0, 500, (2, 700), device="cuda")
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    print(*settings, "finished")
"""

RACE = """
import torch
x = torch.zeros(1 << 20, device="cuda")
with torch.cuda.stream(torch.cuda.Stream()):
    x.add_(1)
"""


def sanitized(code: str, *args: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=240, env=environment)


def test_the_sanitizer_sees_a_race():
    result = sanitized(RACE)
    assert result.returncode != 0
    assert "CSAN detected a possible data race" in result.stderr, result.stderr[-2000:]


def test_steps_have_no_race(tmp_path):
    """In one process, because the sanitizer is slow: on the device, host, attention again, K and V streamed, disk."""
    result = sanitized(STEPS, str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("finished") == 5
    assert "CSAN" not in result.stderr
