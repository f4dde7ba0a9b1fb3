"""Accelerate's utilities that need no job: environment, packages, versions, settings objects, memory."""

import dataclasses
import os
import sys
import unittest
from types import SimpleNamespace

import pytest

from polyaccel import memory
from polyaccel.errors import ConfigError
from polyaccel.utils import (
    DistributedType,
    KwargsHandler,
    PrecisionType,
    RNGType,
    are_libraries_initialized,
    check_cuda_fp8_capability,
    clear_environment,
    compare_versions,
    convert_dict_to_env_variables,
    find_executable_batch_size,
    get_int_from_env,
    is_pytest_available,
    is_torch_version,
    parse_choice_from_env,
    parse_flag_from_env,
    patch_environment,
    purge_accelerate_environment,
    should_reduce_batch_size,
    str_to_bool,
)
from polyaccel.utils import imports as packages


def test_patched_variables_are_as_before_afterwards_whatever_happens(monkeypatch):
    monkeypatch.setenv("KNOWN", "before")

    def fails():
        with patch_environment(known=1, New="x"):
            assert (os.environ["KNOWN"], os.environ["NEW"]) == ("1", "x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert os.environ["KNOWN"] == "before"
    assert "NEW" not in os.environ


def test_a_cleared_environment_comes_back_without_what_was_added():
    before = dict(os.environ)
    with clear_environment():
        assert not os.environ
        os.environ["ADDED"] = "1"
    assert dict(os.environ) == before


@pytest.mark.parametrize(("text", "truth"), [("Yes", 1), ("on", 1), ("T", 1), ("FALSE", 0), ("off", 0), ("n", 0)])
def test_words_for_yes_and_no_are_understood(text, truth, monkeypatch):
    assert str_to_bool(text) == truth
    assert str_to_bool(text, to_bool=True) is bool(truth)
    monkeypatch.setenv("A_FLAG", text)
    assert parse_flag_from_env("A_FLAG") is bool(truth)


def test_another_word_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'perhaps'"):
        str_to_bool("perhaps")


def test_variables_are_read_with_their_defaults(monkeypatch):
    monkeypatch.setenv("SECOND", "3")
    monkeypatch.setenv("CHOICE", "bf16")
    assert get_int_from_env(["FIRST", "SECOND"], 7) == 3
    assert get_int_from_env(["FIRST"], 7) == 7
    assert parse_choice_from_env("CHOICE") == "bf16"
    assert parse_choice_from_env("NO_CHOICE") == "no"
    assert parse_flag_from_env("NO_FLAG", default=True) is True


def test_lines_of_variables_leave_out_what_a_file_cannot_hold(caplog):
    lines = convert_dict_to_env_variables({"A": "1", "B": "<x", "C": "", "D": "two words"})
    assert lines == ["A=1\n"]
    assert [record.name for record in caplog.records] == ["polyaccel.utils.environment"] * 3


def test_purged_tests_leave_no_variable_behind_neither_do_those_of_a_subclass():
    @purge_accelerate_environment
    class Purged(unittest.TestCase):
        def test_sets_a_variable(self):
            os.environ["ACCELERATE_LEFT_BEHIND"] = "1"

        @staticmethod
        def test_static():
            os.environ["POLYACCEL_LEFT_BEHIND"] = "1"

    class InheritsPurging(Purged):
        def test_sets_another(self):
            os.environ["ACCELERATE_LEFT_BEHIND"] = "2"

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(InheritsPurging).run(result)
    assert (result.testsRun, result.errors, result.failures) == (3, [], [])
    assert not {"ACCELERATE_LEFT_BEHIND", "POLYACCEL_LEFT_BEHIND"} & set(os.environ)


def test_a_purged_function_restores_what_it_changed_and_removed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_ONE", "1")
    monkeypatch.setenv("ACCELERATE_TWO", "2")

    @purge_accelerate_environment
    def work():
        os.environ["ACCELERATE_ONE"] = "changed"
        del os.environ["ACCELERATE_TWO"]
        os.environ["UNRELATED_TO_PURGING"] = "stays"
        return 5

    assert work() == 5
    assert (os.environ["ACCELERATE_ONE"], os.environ["ACCELERATE_TWO"]) == ("1", "2")
    assert os.environ.pop("UNRELATED_TO_PURGING") == "stays"


def test_packages_are_found_without_importing_them(monkeypatch, tmp_path):
    (tmp_path / "lomo_optim.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.is_lomo_available()
    assert are_libraries_initialized("lomo_optim", "pytest") == ["pytest"]
    assert is_pytest_available()


def test_a_package_that_is_not_there_and_one_that_is_blocked_are_not_available(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert not packages.is_wandb_available()
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for name in ("torchdata", "torchdata.stateful_dataloader"):  # another test may have loaded them
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert not packages.is_sagemaker_available()
    assert not packages.is_torchdata_stateful_dataloader_available()


def test_every_question_about_packages_and_devices_has_a_yes_or_no():
    names = [name for name in dir(packages) if name.startswith("is_")]
    assert len(names) > 40
    assert {name for name in names if not isinstance(getattr(packages, name)(), bool)} == set()


def test_devices_are_those_that_torch_sees(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert packages.is_cuda_available()
    assert packages.is_fp16_available()
    monkeypatch.setattr(packages, "is_torch_xla_available", lambda check_is_tpu=False: False)
    assert not packages.is_bf16_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not packages.is_cuda_available()
    assert packages.is_bf16_available()


def test_devices_of_one_generation_are_told_from_the_next(monkeypatch):
    torch = pytest.importorskip("torch")
    gaudi = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "GAUDI")
    monkeypatch.setattr(torch, "hpu", gaudi, raising=False)
    assert packages.is_hpu_available()
    assert packages.is_habana_gaudi1()
    gaudi.get_device_name = lambda: "GAUDI2"
    assert not packages.is_habana_gaudi1()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, has_fp8 in (((8, 0), False), ((8, 9), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert check_cuda_fp8_capability() is has_fp8


def test_the_library_is_asked_for_what_it_can_do(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert not packages.is_transformer_engine_mxfp8_available()
    engine = SimpleNamespace(check_mxfp8_support=lambda: (False, "too old a GPU"))
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", engine)
    assert not packages.is_transformer_engine_mxfp8_available()
    engine.check_mxfp8_support = lambda: (True, "")
    assert packages.is_transformer_engine_mxfp8_available()


def test_versions_are_compared_as_versions():
    assert compare_versions("numpy", ">=", "1.9")  # as text, "1.26" < "1.9"
    assert not compare_versions("numpy", "<", "1.9")
    with pytest.raises(ConfigError, match="operation='=>'"):
        compare_versions("numpy", "=>", "1")


def test_the_build_of_torch_does_not_count(monkeypatch):
    from polyaccel.utils import versions

    monkeypatch.setattr(versions, "version", lambda name: "2.9.1+cpu")
    assert is_torch_version("==", "2.9.1")
    assert is_torch_version("<", "2.10")


def test_a_settings_object_tells_what_differs_from_its_defaults():
    @dataclasses.dataclass
    class Settings(KwargsHandler):
        enabled: bool = True
        names: list[str] = dataclasses.field(default_factory=list)
        size: int = 3

    settings = Settings(names=["a"], size=3)
    assert settings.to_kwargs() == {"names": ["a"]}
    settings.to_dict()["names"].append("b")
    assert settings.names == ["a"]


def test_enums_compare_and_print_as_accelerates_do():
    assert DistributedType.MULTI_CPU == "MULTI_CPU"
    assert str(DistributedType.MULTI_CPU) == "DistributedType.MULTI_CPU"
    assert PrecisionType("bf16") is PrecisionType.BF16
    assert str(PrecisionType.BF16) == "bf16"
    assert RNGType("generator") == "generator"


def test_memory_helpers_are_those_of_the_core():
    assert find_executable_batch_size is memory.find_executable_batch_size
    assert should_reduce_batch_size(RuntimeError("CUDA out of memory."))
    assert not should_reduce_batch_size(ValueError("out of memory"))
