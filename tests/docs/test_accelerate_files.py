"""The ready files of `examples/accelerate`, read as `accelerate launch` reads them."""

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.helpers.paths import ROOT


FILES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
PROCESSES = {"ddp": 8, "fsdp2": 8, "fsdp2_cpu": 2, "fsdp2_nodes": 16}


def launched(file, *options):
    """Give the arguments and the environment of processes that the launcher makes of a file."""
    parser = launch_command_parser()
    args = _validate_launch_command(parser.parse_args(["--config_file", str(file), *options, "train.py"]))[0]
    return args, prepare_multi_gpu_env(args)


def test_these_are_all():
    assert {file.stem for file in FILES} == {*PROCESSES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_is_read_without_unknown_keys(file):
    config = ClusterConfig.from_yaml_file(str(file))  # raises for keys that it does not know
    options = vars(launch_command_parser().parse_args(["train.py"]))
    assert {*config.fsdp_config} <= {*options}
    assert config.num_processes == PROCESSES[file.stem]
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_starts_what_it_says(file):
    args, environment = launched(file)
    sharded = file.stem != "ddp"
    assert (args.use_fsdp, args.multi_gpu) == (sharded, not sharded)
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if sharded else None)
    if sharded:
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment  # the model says which
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true" and environment["FSDP_OFFLOAD_PARAMS"] == "false"
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if args.use_cpu else "bf16")


def test_a_second_machine_is_named_on_the_command_line():
    (file,) = [file for file in FILES if file.stem == "fsdp2_nodes"]
    args, _ = launched(file, "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert (args.num_machines, args.machine_rank, args.main_process_ip) == (2, 1, "10.0.0.1")
