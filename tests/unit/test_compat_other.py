"""Accelerate's helpers for scripts: models without wrappers, files of weights, dicts, names, sizes, ports."""

import logging
import platform
import socket
from types import SimpleNamespace

import pytest

from polyaccel import Accelerator, jobs
from polyaccel.config.resolve import resolve
from polyaccel.errors import CheckpointError, ConfigError, UnsupportedError
from polyaccel.utils import (
    check_os_kernel,
    convert_bytes,
    convert_outputs_to_fp32,
    extract_model_from_parallel,
    get_free_port,
    get_pretty_name,
    is_compiled_module,
    is_port_in_use,
    merge_dicts,
    recursive_getattr,
    save,
    wait_for_everyone,
    write_basic_config,
)

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setattr(jobs, "_engines", [])
    monkeypatch.setattr(jobs, "_accelerators", [])
    monkeypatch.setattr(jobs, "_kept", None)
    monkeypatch.setattr(jobs, "_make", None)
    monkeypatch.setenv("POLYACCEL_BACKEND", "torch")


def test_a_model_comes_out_of_what_is_around_it():
    model = torch.nn.Linear(2, 2)
    assert extract_model_from_parallel(torch.nn.DataParallel(torch.nn.DataParallel(model))) is model
    assert extract_model_from_parallel(model) is model
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert extract_model_from_parallel(prepared) is accelerator.unwrap_model(prepared)


def test_wrapped_layers_come_out_too_where_that_is_asked_for():
    layer = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(torch.nn.DataParallel(layer))
    assert extract_model_from_parallel(model)[0] is not layer
    assert extract_model_from_parallel(model, recursive=True)[0] is layer


def test_a_compiled_model_stays_compiled_unless_told_otherwise():
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert is_compiled_module(compiled)
    assert not is_compiled_module(model)
    assert extract_model_from_parallel(torch.nn.DataParallel(compiled)) is compiled
    assert (
        extract_model_from_parallel(
            torch.compile(torch.nn.DataParallel(model), backend="eager"), keep_torch_compile=False
        )
        is model
    )
    kept = extract_model_from_parallel(torch.compile(torch.nn.DataParallel(model), backend="eager"))
    assert kept._orig_mod is model


def test_the_forward_from_before_the_conversion_comes_back():
    model = torch.nn.Linear(2, 2).half()
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(model.forward)
    assert model(torch.ones(1, 2).half()).dtype == torch.float32
    own = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert own(torch.ones(1, 2).half()).dtype == torch.float16
    assert not {"forward", "_original_forward"} & set(vars(own))


def test_weights_are_written_as_safetensors_and_pickles_are_refused(tmp_path):
    from safetensors.torch import load_file

    wait_for_everyone()
    weights = torch.nn.Linear(2, 1).state_dict()
    save(weights, tmp_path / "weights.safetensors")
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["weight"], weights["weight"])
    with pytest.raises(CheckpointError):
        save(weights, tmp_path / "weights.safetensors", safe_serialization=False)
    with pytest.raises(UnsupportedError, match="save_on_each_node"):
        save(weights, tmp_path / "weights.safetensors", save_on_each_node=True)


def test_dicts_are_merged_into_the_destination():
    destination = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merge_dicts({"a": {"x": 5}, "c": {"d": 6}}, destination) is destination
    assert destination == {"a": {"x": 5, "y": 2}, "b": 3, "c": {"d": 6}}


def test_names_and_sizes_are_for_people():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert recursive_getattr(model, "0.weight") is model[0].weight
    assert [get_pretty_name(one) for one in (dict, merge_dicts, 3)] == ["dict", "merge_dicts", "int"]
    assert [convert_bytes(size) for size in (12, 1536, 3 * 1024**3)] == ["12 bytes", "1.5 KB", "3.0 GB"]
    assert convert_bytes(5 * 1024**5) == "5.0 PB"


def test_a_port_is_in_use_while_somebody_listens():
    port = get_free_port()
    assert not is_port_in_use(port)
    with socket.create_server(("localhost", port)):
        assert is_port_in_use(str(port))


@pytest.mark.parametrize(
    ("system", "release", "warns"), [("Linux", "5.4.0-35", True), ("Linux", "6.1.0", False), ("Darwin", "5.4.0", False)]
)
def test_an_old_kernel_is_warned_of(system, release, warns, monkeypatch, caplog):
    monkeypatch.setattr(platform, "uname", lambda: SimpleNamespace(system=system, release=release))
    with caplog.at_level(logging.WARNING):
        check_os_kernel()
    assert ["5.4.0 is older than 5.5.0" in record.getMessage() for record in caplog.records] == [True] * warns


@pytest.mark.parametrize("name", ["config.toml", "config.yml", "config.json"])
def test_a_basic_configuration_is_written_and_read_back(tmp_path, name):
    path = tmp_path / name
    assert write_basic_config("BF16", path) == path
    found = resolve({}, environment={"POLYACCEL_CONFIG_FILE": str(path)})
    assert (found.mixed_precision, found.sources["mixed_precision"].startswith(str(path))) == ("bf16", True)
    assert write_basic_config("no", path) is False
    with pytest.raises(ConfigError, match="mixed_precision='half' is unknown"):
        write_basic_config("half", tmp_path / "other.toml")
