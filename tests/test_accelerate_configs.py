"""The launch configurations, read as `accelerate launch` reads them. A failure: a file does not do what its name says."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).resolve().parents[1] / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
SHARED = [path for path in FILES if "single" not in path.stem]


def test_there_are_some():
    assert len(SHARED) == 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file(path):
    text = path.read_text()
    name = path.stem
    assert text.startswith("# ")
    assert f"accelerate_configs/{path.name}" in text
    config = load_config_from_file(str(path))  # refuses unknown keys
    count = re.search(r"_(\d+)[cg]pu", name)
    assert config.num_processes == (int(count[1]) if count else 1)
    machines = re.search(r"(\d+)nodes", name)
    assert config.num_machines == (int(machines[1]) if machines else 1)
    assert config.use_cpu is False
    # Inside of a section accelerate takes any key. Those that it knows are options of its command line as well.
    known = vars(launch_command_parser().parse_args(["train.py"]))
    for section in ("deepspeed_config", "fsdp_config", "parallelism_config"):
        assert set(getattr(config, section, None) or {}) <= set(known)
    if machines:
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_what_the_processes_get(path, monkeypatch):
    """The variables that accelerate sets for them."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if stage := re.search(r"zero(\d)", path.stem):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
        assert environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1").isdecimal()  # an Accelerator() takes no "auto"
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
        assert "ACCELERATE_USE_DEEPSPEED" not in environment
        assert (environment.get("FSDP_VERSION") == "2") == ("fsdp2" in path.stem)
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    group = re.search(r"_sp(\d+)_dp(\d+)_", path.stem)
    processes = yaml.safe_load(path.read_text())["num_processes"]
    sp, dp = (int(group[1]), int(group[2])) if group else (processes, 1)
    assert sp * dp == processes
    assert environment["PARALLELISM_CONFIG_SP_SIZE"] == str(sp)
    assert environment["PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION"] == "sdpa"
    assert environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == str(dp)
    if "fsdp2" in path.stem:  # accelerate asks for it, and shards over all processes
        assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == str(processes)
    if "offload" in path.stem:
        assert environment["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == "cpu"
