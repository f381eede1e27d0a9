"""
A loop of one's own under `accelerate launch`, its sequences spread over processes, against a plain loop in one: as in
`test_launched.py`. A failure means that such a loop trains something else than Trainer and than one process do.
"""

import json
import sys

import pytest
import torch
import yaml
from started import run
from test_launched import (
    CLIP,
    ENVIRONMENT,
    PATH,
    RATE,
    ROOT,
    SAMPLES,
    STEPS,
    check,
    make_model,
    of_gpus,
    reference,
    tiny_llama,
    zero,
)
from train import Tokens
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(tiny_llama()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["fsdp2", "ddp", "zero2", "zero3"])
def test_trains_and_evaluates_as_one_process(engine, checkpoint, tmp_path):
    """Two accumulated batches a step, clipped."""
    if engine.startswith("zero"):
        config = zero(int(engine[-1]), tmp_path, groups=1, size=2)
        settings = yaml.safe_load(config.read_text())
        settings["deepspeed_config"] |= {"gradient_clipping": CLIP, "gradient_accumulation_steps": 2}
        config.write_text(yaml.safe_dump(settings))
    else:
        config = of_gpus(engine, tmp_path, groups=1, size=2)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    command += ["tests/launched/plain_loop.py", engine, str(checkpoint), str(out), str(STEPS), str(RATE), str(CLIP)]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FPDT_CHUNK_SIZE": "14", "PYTHONPATH": PATH}
    result = run(command, timeout=200, env=ENVIRONMENT | variables, cwd=ROOT)
    check(out, result, *reference(checkpoint, accumulation=2, shuffled=False), watched=False)
    seen = json.loads((out / "log.json").read_text())[-1]
    assert (seen["weights"] == "DTensor") == (engine == "fsdp2")
    assert seen["scheduled"] == STEPS  # of one group
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    samples = Tokens(SAMPLES, 46, model.config.vocab_size)
    with torch.no_grad():
        want = [model(**{name: torch.tensor([ids]) for name, ids in sample.items()}).loss.item() for sample in samples]
    assert seen["evaluated"] == pytest.approx(want, rel=1e-5)
