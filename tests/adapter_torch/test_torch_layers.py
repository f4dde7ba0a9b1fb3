"""Layers of known models and rules of a script on the torch engine: two gloo processes answer, one is what they must be equal to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layers_job
import pytest
import torch
from gloo_jobs import answers_of
from layers_job import ALONE, QUESTIONS


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict[str, Any]]:
    """Those of each process."""
    return answers_of(Path(layers_job.__file__), tmp_path_factory.mktemp("layers"), 2)


def alone(question: str) -> Any:
    """The same training in this process."""
    ask, _, *arguments = QUESTIONS[question]
    return ask(ALONE, *arguments)


def assert_close(given, expected, tolerance=1e-5):
    """fp32 sums in another order."""
    torch.testing.assert_close(torch.tensor(given), torch.tensor(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", ["llama", "tied llama", "gpt2"])
def test_models_of_transformers_are_split_by_their_own_plan_and_names(answers, model):
    expected = alone(model)
    for one in answers:
        assert_close(one[model]["losses"], expected["losses"])
        assert_close(one[model]["norms"], expected["norms"])
        assert one[model]["text"] == expected["text"]
        for name, part in one[model]["parts"].items():
            is_split = name.endswith(("_proj.weight", "c_attn.weight", "c_attn.bias", "c_fc.weight", "c_fc.bias"))
            is_split |= "embed_tokens" in name or "wte" in name or "lm_head" in name
            assert part == (0.5 if is_split else 1), name


def test_backward_on_another_thread_takes_plain_tensors_for_whole_too(answers):
    for one in answers:
        assert one["llama in threads"] == one["llama"]


def test_text_is_generated_from_parameters_in_pieces(answers):
    assert answers[0]["gpt2 on fsdp"]["text"] == answers[1]["gpt2 on fsdp"]["text"] == alone("gpt2")["text"]


def test_rules_of_the_script_say_how_layers_are_split(answers):
    expected = alone("rules")
    for one in answers:
        assert_close(one["rules"]["losses"], expected["losses"])
        assert_close(one["rules"]["norm"], expected["norm"], 1e-4)
        assert {name for name, part in one["rules"]["parts"].items() if part == 0.5} == {
            "expand.weight",
            "shrink.weight",
        }


def test_a_rule_keeps_parameters_whole_and_their_gradients_are_averaged(answers):
    expected = alone("rules, whole")
    for one in answers:
        assert_close(one["rules, whole"]["losses"], expected["losses"])
        assert_close(one["rules, whole"]["norm"], expected["norm"], 1e-4)
        whole = {name for name, part in one["rules, whole"]["parts"].items() if part == 1}
        assert whole == {"norm.weight", "norm.bias", "mix.weight"}


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_blocks_are_computed_again_with_the_same_numbers(answers, axis, remat):
    for one in answers:
        kept, again = one[f"{axis}, remat none"], one[f"{axis}, remat {remat}"]
        assert (kept["calls"], again["calls"]) == (1, 2)
        assert_close(again["losses"], kept["losses"], 1e-7)
        assert_close(again["norms"], kept["norms"], 1e-6)


def test_offloaded_parts_train_alike(answers):
    for one in answers:
        assert_close(one["offload"]["losses"], one["fsdp, remat none"]["losses"], 1e-7)
    assert "offload='cpu'" in answers[0]["offload of tensor"]


@pytest.mark.parametrize("axis", ["fp16", "fp16, fsdp"])
def test_a_gradient_that_is_not_finite_on_one_process_lets_all_skip_the_update(answers, axis):
    expected = layers_job.half(ALONE)
    assert expected["skipped"] == [False, False, True, False, False, False]
    for one in answers:
        assert one[axis]["skipped"] == expected["skipped"]
        assert one[axis]["scales"] == expected["scales"]
        assert_close(one[axis]["losses"], expected["losses"], 0.1)  # losses near 21; fp16 has three digits


def test_averages_of_pieces_are_those_of_one_process_and_continue_on_another_mesh(answers):
    expected = alone("average")
    for one in answers:
        assert_close(one["average"], expected)


@pytest.mark.parametrize("who", ["optimizer", "model"])
def test_gradients_that_wait_for_their_exchange_can_be_dropped(answers, who):
    assert answers[0][f"dropped by the {who}"] == answers[0]["nothing dropped"]


def test_norms_of_another_dtype_are_averaged_by_themselves(answers):
    expected = alone("several dtypes")
    for one in answers:
        assert_close(one["several dtypes"]["losses"], expected["losses"])
        assert_close(one["several dtypes"]["norms"], expected["norms"])


def test_dtypes_that_no_module_keeps_apart_are_refused_by_name(answers):
    together, listed = answers[0]["several dtypes"]["said"]
    assert "scale (float32) and shift (float64) belong to one Unnamed" in together
    assert "1.0 (float64) belongs to a ParameterList, which is not called" in listed


def test_exchanges_of_every_axis_wait_as_long_as_the_configuration_says(answers):
    assert answers[0]["timeouts"] == [77] * 4


def test_a_model_is_created_without_memory_where_it_is_cut(answers):
    first, second = (one["created"] for one in answers)
    assert first == second
    assert first["is_empty"]
    assert first["ranges"]["norm.weight"] == [1, 1]
    low, high = first["ranges"]["expand.weight"]
    assert -0.36 < low < -0.3 < 0.3 < high < 0.36  # 1 / sqrt(8), nn.Linear's own bound
    assert not answers[0]["created on data"]["is_empty"]
    assert "_init_weights" in answers[0]["created, of transformers"]


def test_a_rule_that_torch_cannot_follow_is_an_error_that_names_it_and_the_parameter(answers):
    (said,) = answers[0]["a rule for Bilinear"]
    assert "'*.mix.weight = tensor - -' cuts parameter mix.weight of Mlp over mesh.tensor=2" in said
    (said,) = answers[1]["a rule that does not divide"]
    assert "'*.norm.weight = tensor -' names 2 dims, and parameter norm.weight has shape (8,)" in said


def test_what_no_rule_cuts_is_named_in_the_log_of_the_first_process(answers):
    (said,) = answers[0]["no rule for Bilinear"]
    assert "mix.weight: whole on each of these devices" in said
    assert not answers[1]["no rule for Bilinear"]
