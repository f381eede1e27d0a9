"""
torch's stream sanitizer over whole steps: it follows every read and write of device memory, and reports two on different
streams that no event orders. A failure means a race that the tests with slow copies did not happen to hit.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

STEP = """
import torch, hf_fpdt
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, use_cache=False)
model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
settings = SETTINGS
hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=96, kernel="naive", **settings))
ids = torch.randint(0, 500, (2, 700), device="cuda")
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
torch.cuda.synchronize()
print("finished")
"""

RACE = """
import torch
x = torch.zeros(1 << 20, device="cuda")
with torch.cuda.stream(torch.cuda.Stream()):
    x.add_(1)
"""


def sanitized(code: str, *args: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, env=environment)


def test_the_sanitizer_sees_a_race():
    result = sanitized(RACE)
    assert result.returncode != 0
    assert "CSAN detected a possible data race" in result.stderr, result.stderr[-2000:]


@pytest.mark.parametrize(
    "settings",
    [
        {"offload": "host"},
        {"offload": "host", "save_attention": False},
        {"offload": "host", "kv": "streamed"},
        {},
    ],
    ids=str,
)
def test_a_step_has_no_race(settings):
    result = sanitized(STEP.replace("SETTINGS", repr(settings)))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["finished"]
    assert "CSAN" not in result.stderr


def test_a_step_over_disk_has_no_race(tmp_path):
    result = sanitized(
        STEP.replace("SETTINGS", repr({"offload": "disk", "disk_folder": str(tmp_path), "host_memory": 2 << 20}))
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["finished"]
