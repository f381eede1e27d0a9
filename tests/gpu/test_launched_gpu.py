"""
The launches of `test_launched.py` on two GPUs, with NCCL and the configurations as they are shipped, in fp32: against a plain
loop on the CPU. A failure means that an engine trains something else on GPUs than on CPUs.
"""

import pytest
import torch
import yaml
from test_launched import ROOT, RUN, check, checkpoints, launch, reference  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="sequences are shared by two GPUs"),
]


@pytest.mark.parametrize(
    ("engine", "family", "accumulation"),
    [("zero3", "llama", 2), ("zero2", "neox", 1), ("fsdp2", "llama", 1), ("ddp", "neox", 2)],
)
def test_trains_as_one_process(engine, family, accumulation, checkpoints, tmp_path):  # noqa: F811
    name = "zero3" if engine == "zero2" else engine
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"fpdt_{name}_2gpu.yaml").read_text()) | {"mixed_precision": "no"}
    if engine == "zero2":
        config["deepspeed_config"] = {"zero_stage": 2, "gradient_clipping": "auto"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = [*RUN, "--model", str(checkpoints / family), "--gradient_accumulation_steps", str(accumulation)]
    result = launch(tmp_path / "config.yaml", words, tmp_path / "out", backend=None, fresh=True)  # nothing forked has a GPU
    check(tmp_path / "out", result, *reference(checkpoints / family, accumulation=accumulation))
