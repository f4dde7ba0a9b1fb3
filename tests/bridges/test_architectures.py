"""Unmodified models of transformers, one or two of each family: losses and gradients on jax are torch's; the page is what was measured.

All architectures run by `scripts/coverage architectures`; what is here is trained for a few steps in every test run.
"""

from __future__ import annotations

import logging
from typing import Any

import architecture_table
import architectures
import bridge_scripts
import pytest
import torch
from architecture_case import Case
from architecture_run import measure
from text_models import GROUPED, SIZES, built, causal, causal_padded

from polyaccel import Accelerator

CASES = architectures.cases()
STEPS = 4
CHOSEN = ("BERT", "Llama", "T5", "Mixtral", "Mamba")
# Families that are not named there are represented by their first case.
REPRESENTATIVES = (
    *CHOSEN,
    *{
        case.family: name
        for name, case in reversed(CASES.items())
        if case.needs == ("transformers",) and case.family not in {CASES[chosen].family for chosen in CHOSEN}
    }.values(),
)


def make(backend: str) -> Any:
    return bridge_scripts.on_jax(1) if backend == "jax" else Accelerator(backend=backend, cpu=True)


def assert_passes(case: Case, steps: int = STEPS) -> dict[str, Any]:
    row = measure(case, steps, make)
    assert row["status"] == "passed", row
    return row


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_model_of_each_family_trains_as_on_torch(name):
    assert_passes(CASES[name])


def test_gradient_checkpointing_gives_the_same_gradients():
    def build():
        model = CASES["Llama"].build()
        if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5
            model.activation_checkpointing_enable()
        else:
            model.gradient_checkpointing_enable()
        return model

    assert_passes(Case("Llama, checkpointed", "decoders", build, causal_padded), steps=2)


def test_experts_that_were_set_to_loop_are_captured_as_grouped_products():
    build = built(
        "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, experts_implementation="eager", **SIZES, **GROUPED
    )
    assert_passes(Case("Mixtral, eager", "mixtures of experts", build, causal), steps=2)


def test_experts_without_a_fixed_form_of_their_own_say_what_an_idle_one_gets(caplog):
    with caplog.at_level(logging.WARNING, logger="polyaccel_bridges"):
        assert_passes(CASES["Switch Transformers"], steps=2)
    assert "SwitchTransformersExperts" in caplog.text
    assert "gradients of 0 where torch has none" in caplog.text


def test_a_cache_that_a_model_returns_by_default_is_left_behind_and_named_when_used():
    model = bridge_scripts.on_jax(1).prepare(CASES["Llama"].build())
    outputs = model(**CASES["Llama"].batch(0))
    assert outputs.logits.shape == (2, 16, 100)
    with pytest.raises(Exception, match="DynamicCache"):
        outputs.past_key_values.get_seq_length()


def test_the_page_tells_what_was_measured():
    rows = architecture_table.read()
    assert architecture_table.PAGE.read_text(encoding="utf-8") == architecture_table.page(rows)
    assert set(rows) <= set(CASES), "rows of cases that are gone: run scripts/coverage architectures"


def test_nothing_in_the_table_has_failed():
    assert {name: row["reason"] for name, row in architecture_table.read().items() if row["status"] == "failed"} == {}


def test_hidden_states_attentions_and_router_logits_are_recorded_once():
    build = built(
        "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, output_router_logits=True,
        output_hidden_states=True, **SIZES, **GROUPED,
    )  # fmt: skip
    model = bridge_scripts.on_jax(1).prepare(build())
    batch = causal(0)
    for _ in range(2):
        outputs = model(**batch)
        assert len(outputs.router_logits) == SIZES["num_hidden_layers"]
        assert len(outputs.hidden_states) == SIZES["num_hidden_layers"] + 1
    assert torch.isfinite(outputs.loss)
