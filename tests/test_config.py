"""The settings: a typo must be an error at construction, not a run with other settings than asked for."""

import dataclasses

import pytest

from hf_fpdt import FPDTConfig
from hf_fpdt.config import KERNEL_NAMES
from hf_fpdt.kernel_choice import KERNELS


def test_defaults():
    config = FPDTConfig()
    fields = dataclasses.asdict(config)
    assert fields.pop("disk_folder") is None
    assert set(fields) == {
        "chunk_size", "kernel", "recompute", "save_attention", "offload", "kv", "gpu_memory", "optimizer_memory",
        "host_memory",
    }  # fmt: skip
    assert set(fields.values()) == {"auto"}


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_size": 1}, {"chunk_size": 1 << 20}, {"save_attention": True}, {"save_attention": False}, {"offload": "none"},
        {"offload": "host"}, {"host_memory": 1 << 40}, {"gpu_memory": 1}, {"optimizer_memory": 0}, {"recompute": True},
        {"recompute": False},
        {"kv": "streamed"}, {"kv": "streamed", "offload": "host"}, {"offload": "disk", "disk_folder": "/mnt/nvme"},
        *({"kernel": name} for name in KERNEL_NAMES),
    ],
)  # fmt: skip
def test_good_values(settings):
    config = FPDTConfig(**settings)
    assert all(getattr(config, name) is value for name, value in settings.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, r"FPDTConfig\(chunk_size=0\): chunk_size must be .*at least 1"),
        ({"chunk_size": -5}, r"FPDTConfig\(chunk_size=-5\)"),
        ({"chunk_size": 2.0}, r"FPDTConfig\(chunk_size=2.0\)"),
        ({"chunk_size": True}, r"FPDTConfig\(chunk_size=True\)"),
        ({"chunk_size": None}, r"FPDTConfig\(chunk_size=None\)"),
        ({"chunk_size": "16384"}, r"FPDTConfig\(chunk_size='16384'\)"),
        ({"kernel": "flash"}, r"FPDTConfig\(kernel='flash'\): kernel must be one of 'auto', 'flash_attention_4'"),
        ({"kernel": None}, r"FPDTConfig\(kernel=None\)"),
        ({"save_attention": 1}, r"FPDTConfig\(save_attention=1\): save_attention must be one of 'auto', True, False"),
        ({"save_attention": 0}, r"FPDTConfig\(save_attention=0\)"),
        ({"save_attention": "no"}, r"FPDTConfig\(save_attention='no'\)"),
        ({"save_attention": None}, r"FPDTConfig\(save_attention=None\)"),
        ({"offload": True}, r"FPDTConfig\(offload=True\): offload must be one of 'auto', 'none', 'host'"),
        ({"offload": "cpu"}, r"FPDTConfig\(offload='cpu'\)"),
        ({"host_memory": 0}, r"FPDTConfig\(host_memory=0\): host_memory must be .* whole number of bytes, at least 1"),
        ({"host_memory": "64GiB"}, r"FPDTConfig\(host_memory='64GiB'\)"),
        ({"host_memory": 1e9}, r"FPDTConfig\(host_memory=1000000000.0\)"),
        ({"offload": None}, r"FPDTConfig\(offload=None\)"),
        ({"gpu_memory": 0}, r"FPDTConfig\(gpu_memory=0\): gpu_memory must be .* whole number of bytes, at least 1"),
        ({"optimizer_memory": -1}, r"FPDTConfig\(optimizer_memory=-1\): .* whole number of bytes, at least 0"),
        ({"optimizer_memory": "adafactor"}, r"FPDTConfig\(optimizer_memory='adafactor'\)"),
        ({"recompute": "never"}, r"FPDTConfig\(recompute='never'\): recompute must be one of 'auto', True, False"),
        ({"recompute": 1}, r"FPDTConfig\(recompute=1\)"),
        ({"kv": "streamed", "offload": "none"}, r"FPDTConfig\(kv='streamed', offload='none'\): .* set offload=\"host\""),
        ({"recompute": False, "offload": "host"}, r"FPDTConfig\(recompute=False, offload='host'\): .* set offload=\"none\""),
        ({"recompute": False, "kv": "streamed"}, r"FPDTConfig\(recompute=False, kv='streamed'\): .* set kv=\"resident\""),
        ({"recompute": False, "save_attention": False}, r"recompute=False, save_attention=False\): .* set save_attention=True"),
        ({"offload": "disk"}, r"FPDTConfig\(offload='disk', disk_folder=None\): name a folder"),
        ({"disk_folder": "/mnt"}, r"FPDTConfig\(offload='auto', disk_folder='/mnt'\): .* with offload=\"disk\" and only then"),
    ],
)
def test_bad_values(settings, message):
    with pytest.raises(ValueError, match=message):
        FPDTConfig(**settings)


def test_frozen_and_keyword_only():
    config = FPDTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.chunk_size = 5
    with pytest.raises(TypeError):
        FPDTConfig(16384)
    with pytest.raises(ValueError, match="chunk_size=0"):
        dataclasses.replace(config, chunk_size=0)


def test_equal_and_hashable():
    assert FPDTConfig(chunk_size=5) == FPDTConfig(chunk_size=5) != FPDTConfig(chunk_size=6)
    assert len({FPDTConfig(), FPDTConfig(), FPDTConfig(kernel="naive")}) == 2


def test_every_kernel_can_be_named():
    assert set(KERNEL_NAMES) == set(KERNELS)
