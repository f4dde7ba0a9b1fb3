"""Sharding rules: what matches, what follows from layers' names, plans and metadata, and what every spec keeps."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel import ShardingRule
from polyaccel.cli.main import main
from polyaccel.config.arguments import config_of_arguments
from polyaccel.errors import ConfigError, PlanError, UnsupportedError
from polyaccel.plan import make_plan
from polyaccel.sharding.logical import axes_of_names
from polyaccel.sharding.plan import ModelHints, local_shape, num_shards, plan_shardings, say_unused_rules, with_fsdp
from polyaccel.topology import Topology

TENSOR2 = {"fsdp": 1, "tensor": 2}
BOTH = {"fsdp": 2, "tensor": 2}


def specs(shapes, sizes=TENSOR2, rules=(), hints=None):
    return plan_shardings(shapes, sizes, rules, hints).specs


# -- properties ------------------------------------------------------------------------------------------------------------

NAMES = ["a.q_proj.weight", "a.o_proj.weight", "b.wte.weight", "norm.weight", "a.query.kernel", "a.out.bias", "x.y.z"]
shapes_by_name = st.dictionaries(
    st.sampled_from(NAMES), st.lists(st.integers(0, 24), max_size=4).map(tuple), min_size=1
)
mesh_sizes = st.fixed_dictionaries({"fsdp": st.sampled_from([1, 2, 3, 4]), "tensor": st.sampled_from([1, 2, 3, 4])})


@given(shapes_by_name, mesh_sizes)
def test_every_dim_divides_and_the_pieces_make_up_the_parameter(shapes, sizes):
    plan = plan_shardings(shapes, sizes)
    assert list(plan.specs) == list(shapes)
    for name, shape in shapes.items():
        spec = plan.specs[name]
        assert len(spec) == len(shape)
        used = [axis for axis in spec if axis]
        assert len(set(used)) == len(used)
        assert all(sizes[axis] > 1 for axis in used)
        assert all(length % sizes[axis] == 0 for length, axis in zip(shape, spec, strict=True) if axis)
        assert math.prod(local_shape(shape, spec, sizes)) * num_shards(spec, sizes) == math.prod(shape)


@given(shapes_by_name, mesh_sizes)
def test_what_could_be_cut_over_fsdp_is(shapes, sizes):
    for name, spec in plan_shardings(shapes, sizes).specs.items():
        free = [n for n, axis in zip(shapes[name], spec, strict=True) if axis is None and n and n % sizes["fsdp"] == 0]
        assert sizes["fsdp"] == 1 or "fsdp" in spec or not free


@given(st.permutations([ShardingRule("*.weight", ("tensor",)), ShardingRule("layer.*", (None, "tensor"))]))
def test_the_first_rule_that_matches_counts(rules):
    found = specs({"layer.weight": (4, 6)}, rules=rules)["layer.weight"]
    assert found == (("tensor", None) if rules[0].pattern == "*.weight" else (None, "tensor"))


@given(st.text("abc.*_", min_size=1), st.lists(st.sampled_from([None, "tensor"]), max_size=1) | st.none())
def test_a_rule_is_what_its_text_says(pattern, axes):
    rule = ShardingRule(pattern, None if axes is None else tuple(axes))
    again = ShardingRule.of(str(rule))
    assert again.pattern == rule.pattern
    assert again.axes == (rule.axes if rule.axes != () else (None,))


# -- rules -----------------------------------------------------------------------------------------------------------------


def test_a_pattern_matches_at_the_start_of_a_name_too():
    assert ShardingRule("*.head.weight", ("tensor",)).matches("head.weight")
    assert ShardingRule("*.head.weight", ("tensor",)).matches("model.head.weight")
    assert not ShardingRule("*.head.weight", ("tensor",)).matches("overhead.weight")


def test_a_rule_of_tensor_leaves_fsdp_its_largest_free_dim_unless_it_says_whole():
    shapes = {"a": (8, 4), "b": (8, 4), "c": (8, 4), "d": (8, 4)}
    rules = [ShardingRule("a", ("tensor",)), ShardingRule("b", None), ShardingRule("c", (None, "fsdp"))]
    assert specs(shapes, BOTH, rules) == {
        "a": ("tensor", "fsdp"),
        "b": (None, None),
        "c": (None, "fsdp"),
        "d": ("fsdp", None),
    }


def test_a_rule_that_cannot_hold_names_the_parameter():
    with pytest.raises(PlanError, match=r"odd\.weight, whose shape is \(3, 4\), over mesh\.tensor=2.*\n?.*hint"):
        specs({"odd.weight": (3, 4)}, rules=[ShardingRule("*.weight", ("tensor",))])
    with pytest.raises(PlanError, match=r"names 2 dims, and parameter q\.bias has shape \(4,\)"):
        specs({"q.bias": (4,)}, rules=[ShardingRule("q.*", ("tensor", None))])
    assert specs({"odd.weight": (3, 4)}, {"tensor": 1}, [ShardingRule("*.weight", ("tensor",))]) == {
        "odd.weight": (None, None)
    }


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ShardingRule("a", ("data",)), "over which parameters are repeated"),
        (lambda: ShardingRule("a", ("tenor",)), "tensor"),
        (lambda: ShardingRule("a", ("tensor", "tensor")), "for two dims"),
        (lambda: ShardingRule("a", "tensor"), "one entry per dim"),
        (lambda: ShardingRule("", ("tensor",)), "names no parameter"),
        (lambda: ShardingRule.of("a"), "says of no dim"),
        (lambda: ShardingRule.of("a ="), "says of no dim"),
        (lambda: ShardingRule.of(3), "has a int"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_rules_are_a_setting_as_objects_and_as_texts():
    rule = ShardingRule("*.q_proj.weight", ("tensor", None))
    config = config_of_arguments({"sharding_rules": [rule, "*.router.weight = whole"]})
    assert config.sharding_rules == ("*.q_proj.weight = tensor -", "*.router.weight = whole")
    assert config.parameter_rules == (rule, ShardingRule("*.router.weight", None))
    with pytest.raises(ConfigError, match="is no list"):
        config_of_arguments({"sharding_rules": rule})


def test_a_file_with_a_rule_that_means_nothing_is_refused_with_its_line(tmp_path, capsys):
    path = tmp_path / "polyaccel.toml"
    path.write_text('seed = 1\nsharding_rules = ["*.q_proj.weight = tensr -"]\n')
    assert main(["config", "check", str(path)]) == 1
    said = capsys.readouterr().err
    assert "polyaccel.toml:2" in said
    assert "names the mesh axis 'tensr', which is unknown" in said


def test_keys_and_values_that_heads_share_are_not_cut_inside_a_head():
    shapes = {"attn.q_proj.weight": (32, 32), "attn.k_proj.weight": (16, 32)}
    hints = ModelHints(heads={"attn.k_proj": 2})
    plan = plan_shardings(shapes, {"fsdp": 1, "tensor": 4}, (), hints)
    assert plan.specs == {"attn.q_proj.weight": ("tensor", None), "attn.k_proj.weight": (None, None)}
    assert plan.indivisible == {"attn.k_proj.weight": "its 2 heads do not divide by mesh.tensor=4"}
    assert plan.uneven == {}
    assert plan_shardings(shapes, TENSOR2, (), hints).specs["attn.k_proj.weight"] == ("tensor", None)


def test_rules_that_match_no_parameter_of_any_model_are_named(caplog):
    rules = [ShardingRule("*.q_proj.weight", ("tensor",)), ShardingRule("head.*", None)]
    with caplog.at_level("WARNING", "polyaccel.sharding"):
        say_unused_rules(rules, ["layers.0.q_proj.weight"])
    (said,) = caplog.messages
    assert said == "sharding rule 'head.* = whole' matches no parameter. There are layers.0.q_proj.weight"


def test_an_engine_that_cuts_nothing_by_name_refuses_rules():
    config = config_of_arguments({"sharding_rules": ["*.head.weight = tensor"]})
    topology = Topology(
        process_index=0, num_processes=1, local_process_index=0, num_local_devices=1, num_devices=1, device_kind="cpu"
    )
    known = {"backend": "fake", "mesh_axes": frozenset({"data"}), "mixed_precision": frozenset({"no"})}
    with pytest.raises(
        UnsupportedError, match=r"sharding_rules=.*argument sharding_rules.* is not supported by backend"
    ):
        make_plan(config, topology, features=frozenset(), **known)
    plan = make_plan(config, topology, features=frozenset({"sharding_rules"}), **known)
    assert plan.sharding_rules == (ShardingRule("*.head.weight", ("tensor",)),)


# -- names -----------------------------------------------------------------------------------------------------------------


def test_linear_layers_of_a_llama_are_cut_by_their_names():
    layer = "model.layers.0"
    found = specs(
        {
            "model.embed_tokens.weight": (32, 8),
            f"{layer}.self_attn.q_proj.weight": (8, 8),
            f"{layer}.self_attn.k_proj.weight": (4, 8),
            f"{layer}.self_attn.v_proj.bias": (4,),
            f"{layer}.self_attn.o_proj.weight": (8, 8),
            f"{layer}.self_attn.o_proj.bias": (8,),
            f"{layer}.mlp.gate_proj.weight": (16, 8),
            f"{layer}.mlp.down_proj.weight": (8, 16),
            f"{layer}.input_layernorm.weight": (8,),
            "lm_head.weight": (32, 8),
        }
    )
    column, row = ("tensor", None), (None, "tensor")
    assert list(found.values()) == [column, column, column, ("tensor",), row, (None,), column, row, (None,), column]


@pytest.mark.parametrize("is_conv1d", [True, False])
def test_the_same_names_are_read_as_conv1d_or_linear(is_conv1d):
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_proj.weight": (8, 8), "h.0.mlp.c_fc.weight": (8, 32)}
    shapes = shapes if is_conv1d else {name: shape[::-1] for name, shape in shapes.items()}
    column, row = ((None, "tensor"), ("tensor", None)) if is_conv1d else (("tensor", None), (None, "tensor"))
    assert list(specs(shapes).values()) == [column, row, column]
    said = ModelHints(input_first=frozenset(shapes) if is_conv1d else frozenset())
    assert list(specs(shapes, hints=said).values()) == [column, row, column]


def test_kernels_of_flax_are_cut_by_heads():
    found = specs(
        {
            "attn.query.kernel": (8, 4, 2),
            "attn.query.bias": (4, 2),
            "attn.out.kernel": (4, 2, 8),
            "attn.out.bias": (8,),
            "mlp.up_proj.kernel": (8, 32),
            "mlp.down_proj.kernel": (32, 8),
            "wte.embedding": (32, 8),
        }
    )
    assert list(found.values()) == [
        (None, "tensor", None),
        ("tensor", None),
        ("tensor", None, None),
        (None,),
        (None, "tensor"),
        ("tensor", None),
        ("tensor", None),
    ]


def test_both_axes_cut_one_matrix():
    found = specs({"q_proj.weight": (8, 6), "o_proj.weight": (8, 6), "norm.weight": (6,)}, BOTH)
    assert found == {
        "q_proj.weight": ("tensor", "fsdp"),
        "o_proj.weight": ("fsdp", "tensor"),
        "norm.weight": ("fsdp",),
    }


def test_what_no_rule_names_and_what_does_not_divide_is_said(caplog):
    shapes = {"mystery.weight": (8, 8), "norm.weight": (8,), "wte.weight": (50257, 8)}
    plan = plan_shardings(shapes, BOTH)
    assert plan.unmatched == ("mystery.weight",)
    assert list(plan.indivisible) == ["wte.weight"]
    assert plan.specs["wte.weight"] == (None, "fsdp")
    assert plan.uneven == {"wte.weight": ("tensor", None)}
    with caplog.at_level(logging.WARNING, "polyaccel.sharding"):
        plan.say("model_0", BOTH)
    assert "mesh.tensor=2 cuts mystery.weight" in caplog.text
    assert (
        "wte.weight is kept whole over mesh.tensor: dim 0 of its shape (50257, 8) does not divide by mesh.tensor=2"
        in caplog.text
    )
    quiet = plan_shardings(shapes, BOTH, [ShardingRule("mystery.*", None), ShardingRule("wte.*", None)])
    assert not quiet.unmatched
    assert not quiet.indivisible


# -- plans and metadata ----------------------------------------------------------------------------------------------------


def test_a_plan_of_transformers_counts_before_names_and_after_rules():
    plan = ModelHints(
        plan={
            "layers.*.attn.odd_name": "colwise",
            "layers.*.attn.q_proj": "rowwise",
            "layers.*.experts.gate_up_proj": "packed_colwise",
            "layers.*.experts.down_proj": "grouped_gemm",
            "embed": "embedding_colwise",
        }
    )
    shapes = {
        "layers.0.attn.odd_name.weight": (8, 4),
        "layers.0.attn.q_proj.weight": (8, 4),
        "layers.0.experts.gate_up_proj": (2, 8, 4),
        "layers.0.experts.down_proj": (2, 4, 8),
        "embed.weight": (32, 8),
        "layers.0.up_proj.weight": (8, 4),
    }
    found = plan_shardings(shapes, TENSOR2, hints=plan)
    assert list(found.specs.values()) == [
        ("tensor", None),
        (None, "tensor"),
        (None, "tensor", None),
        (None, None, None),
        (None, "tensor"),
        ("tensor", None),
    ]
    assert found.unmatched == ("layers.0.experts.down_proj",)
    rules = [ShardingRule("*.q_proj.weight", ("tensor",))]
    assert specs(shapes, TENSOR2, rules, plan)["layers.0.attn.q_proj.weight"] == ("tensor", None)


def test_names_of_dims_become_axes():
    assert axes_of_names((None, "tensor")) == ((None, "tensor"), ())
    assert axes_of_names(("embed", "mlp")) == (("fsdp", "tensor"), ())
    assert axes_of_names(("rows", "columns"), [("rows", "tensor"), ("columns", None)]) == (("tensor", None), ())
    assert axes_of_names(("heads", "mlp")) == (("tensor", None), ())
    assert axes_of_names((("data", "fsdp"), "lanes")) == (("fsdp", None), ("lanes",))


def test_metadata_that_does_not_divide_is_an_error_and_fsdp_takes_the_rest():
    hints = ModelHints(axes={"kernel": (None, "tensor")})
    assert specs({"kernel": (8, 4)}, BOTH, hints=hints) == {"kernel": ("fsdp", "tensor")}
    with pytest.raises(PlanError, match=r"metadata .* parameter kernel, whose shape is"):
        specs({"kernel": (8, 3)}, BOTH, hints=hints)


def test_fsdp_takes_the_largest_dim_that_divides():
    assert with_fsdp((8, 12), (None, None), 4) == (None, "fsdp")
    assert with_fsdp((8, 13), (None, None), 4) == ("fsdp", None)
    assert with_fsdp((8, 8), (None, None), 4) == ("fsdp", None)
    assert with_fsdp((8, 12), (None, "tensor"), 4) == ("fsdp", "tensor")
    assert with_fsdp((3, 5), (None, None), 4) == (None, None)
    assert with_fsdp((0, 4), (None, None), 4) == (None, "fsdp")
    assert with_fsdp((), (), 4) == ()
