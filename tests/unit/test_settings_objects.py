"""Accelerate's settings objects: each of their fields is a setting, with the precedence of an argument where it was given."""

import copy
from dataclasses import fields

import pytest

from polyaccel import Accelerator, DataLoaderConfiguration
from polyaccel.config.arguments import config_of_arguments
from polyaccel.config.settings import SETTINGS
from polyaccel.errors import ConfigError
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend
from polyaccel.utils import GradientAccumulationPlugin

register_backend(FakeBackend())


def test_every_field_of_a_settings_object_is_a_setting_with_the_same_default():
    for field in fields(DataLoaderConfiguration):
        assert SETTINGS[field.name].default == field.default, field.name
    for field in fields(GradientAccumulationPlugin):
        if field.name != "num_steps":
            assert SETTINGS[field.name].default == field.default, field.name


def test_a_settings_object_reaches_the_config_with_the_source_of_an_argument():
    accelerator = Accelerator(
        backend="fake",
        dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False),
    )
    assert accelerator.split_batches
    assert not accelerator.plan.even_batches
    assert accelerator.gradient_accumulation_steps == 3
    assert not accelerator.gradient_state.sync_with_dataloader
    assert accelerator.config.sources["split_batches"] == "argument dataloader_config"


def test_a_field_that_was_left_alone_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("POLYACCEL_EVEN_BATCHES", "false")
    monkeypatch.setenv("POLYACCEL_SPLIT_BATCHES", "true")
    assert not config_of_arguments({"dataloader_config": DataLoaderConfiguration(split_batches=False)}).even_batches
    assert not config_of_arguments({"dataloader_config": DataLoaderConfiguration(split_batches=False)}).split_batches
    assert config_of_arguments({"dataloader_config": DataLoaderConfiguration(even_batches=True)}).even_batches
    later = DataLoaderConfiguration()
    later.split_batches = False
    later.even_batches = True
    assert not config_of_arguments({"dataloader_config": later}).even_batches  # as a default, it says nothing


def test_a_settings_object_and_an_argument_may_not_contradict_each_other():
    config = config_of_arguments({"split_batches": True, "dataloader_config": DataLoaderConfiguration(True)})
    assert config.split_batches
    with pytest.raises(ConfigError, match="split_batches=False contradicts dataloader_config") as caught:
        Accelerator(split_batches=False, dataloader_config=DataLoaderConfiguration(split_batches=True))
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match=r"steps=2 contradicts gradient_accumulation_plugin, which says .*=4"):
        Accelerator(gradient_accumulation_steps=2, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=4))
    with pytest.raises(ConfigError, match="dataloader_config is a dict"):
        Accelerator(dataloader_config={"split_batches": True})


def test_an_impossible_value_is_named():
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=0 must be at least 1"):
        Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=0))
    with pytest.raises(ConfigError, match="data_seed='now' is not an integer"):
        Accelerator(dataloader_config=DataLoaderConfiguration(data_seed="now"))


def test_copies_keep_what_differs_and_kwargs_are_only_that():
    plugin = GradientAccumulationPlugin(4, adjust_scheduler=True)
    assert plugin.to_kwargs() == {"num_steps": 4}
    assert plugin.given() == {"num_steps": 4, "adjust_scheduler": True}
    assert copy.deepcopy(plugin).given() == {"num_steps": 4, "adjust_scheduler": True}
    assert plugin.to_dict() == {
        "num_steps": 4,
        "adjust_scheduler": True,
        "sync_with_dataloader": True,
        "sync_each_batch": False,
    }
