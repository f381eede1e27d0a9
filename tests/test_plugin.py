"""Settings of a launched run: which source wins, and that nothing that is set is ignored."""

import pytest
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig

from hf_fpdt import FPDTConfig, FPDTPlugin
from hf_fpdt.plugin import resolve_settings


def test_priority():
    base = FPDTConfig(chunk_size=10, kernel="naive", offload="host")
    plugin = FPDTPlugin(config=FPDTConfig(chunk_size=20, kernel="cudnn"))
    block, environment = {"chunk_size": 30}, {"FPDT_CHUNK_SIZE": "40", "OTHER": "x"}
    assert resolve_settings(base, None, None, {}) == base
    assert resolve_settings(base, plugin, None, {}) == FPDTConfig(chunk_size=20, kernel="cudnn", offload="host")
    assert resolve_settings(base, plugin, block, {}).chunk_size == 30
    assert resolve_settings(base, plugin, block, environment) == FPDTConfig(chunk_size=40, kernel="cudnn", offload="host")


def test_variables_of_every_type():
    environment = {"FPDT_SAVE_ATTENTION": "False", "FPDT_GPU_MEMORY": "1000", "FPDT_OFFLOAD": "host", "FPDT_KV": "resident"}
    found = resolve_settings(FPDTConfig(), None, None, environment)
    assert found == FPDTConfig(save_attention=False, gpu_memory=1000, offload="host", kv="resident")


@pytest.mark.parametrize(
    ("block", "environment", "message"),
    [
        (
            {"chunksize": 3},
            {},
            r'"fpdt" block of the DeepSpeed configuration sets chunksize, which is no setting; .*chunk_size',
        ),
        (None, {"FPDT_CHUNKS": "3"}, "The environment sets FPDT_CHUNKS, which is no setting; .*FPDT_CHUNK_SIZE"),
        (None, {"FPDT_CHUNK_SIZE": "-3"}, "chunk_size='-3'"),
        ({"offload": "nvme"}, {}, "offload='nvme'"),
        ("auto", {}, "must be a JSON object"),
    ],
)
def test_refused(block, environment, message):
    with pytest.raises(ValueError, match=message):
        resolve_settings(FPDTConfig(), None, block, environment)


def test_attention_implementations():
    plain = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
    assert resolve_settings(FPDTConfig(), plain, None, {}) == FPDTConfig()
    flash = DeepSpeedSequenceParallelConfig(sp_attn_implementation="flash_attention_2")
    assert resolve_settings(FPDTConfig(), flash, None, {}).kernel == "flash_attention_2"
    with pytest.raises(ValueError, match="sp_attn_implementation='flash_attention_3': hf_fpdt needs one of None, 'sdpa'"):
        resolve_settings(FPDTConfig(), DeepSpeedSequenceParallelConfig(sp_attn_implementation="flash_attention_3"), None, {})


def test_accelerate_takes_the_plugin():
    plugin = FPDTPlugin(config=FPDTConfig(chunk_size=64))
    parallelism = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=plugin)
    assert parallelism.sp_handler is plugin
    with pytest.raises(ValueError, match=r"FPDTPlugin\(config=...\) got dict"):
        FPDTPlugin(config={"chunk_size": 3})
