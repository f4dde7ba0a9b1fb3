"""Configuration files: TOML and YAML mean the same, every mistake has its line, and no file makes it crash."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.config.files import read_file
from polyaccel.config.resolve import gather, resolve
from polyaccel.config.settings import SETTINGS
from polyaccel.errors import ConfigError, PolyaccelError

TOML = """
mixed_precision = "bf16"
rng_types = ["torch", "numpy"]
split_batches = true
[mesh]
fsdp = 2
data = -1
[launch]
num_processes = 4
"""
YAML = """
mixed_precision: bf16
rng_types: [torch, numpy]
split_batches: yes
mesh:
  fsdp: 2
  data: -1
launch: {num_processes: 4}
"""


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def environment_of(path):
    return {"POLYACCEL_CONFIG_FILE": str(path)}


def test_toml_and_yaml_say_the_same(tmp_path):
    toml = read_file(written(tmp_path, "a.toml", TOML))
    yaml = read_file(written(tmp_path, "a.yaml", YAML))
    assert toml.values == yaml.values
    assert toml.values["mesh.fsdp"] == 2
    assert toml.values["rng_types"] == ("torch", "numpy")
    assert toml.problems == yaml.problems == []


def test_a_value_knows_its_file_and_line(tmp_path):
    path = written(tmp_path, "a.toml", TOML)
    config = resolve({}, environment_of(path))
    assert config.mesh.fsdp == 2
    assert config.sources["mixed_precision"] == f"{path}:2"
    assert config.sources["mesh.fsdp"] == f"{path}:6"


def test_the_environment_beats_the_file_and_flags_beat_the_environment(tmp_path):
    path = written(tmp_path, "a.toml", 'seed = 1\nmixed_precision = "bf16"\ngradient_accumulation_steps = 2')
    environment = {**environment_of(path), "POLYACCEL_SEED": "2", "POLYACCEL_GRADIENT_ACCUMULATION_STEPS": "3"}
    gathered = gather(environment, flags={"gradient_accumulation_steps": "4"})
    assert (gathered.values["mixed_precision"], gathered.values["seed"]) == ("bf16", 2)
    assert gathered.values["gradient_accumulation_steps"] == 4
    assert gathered.sources["gradient_accumulation_steps"] == "flag --gradient-accumulation-steps"


def test_the_file_of_the_working_folder_is_found_and_off_turns_it_off(tmp_path, monkeypatch):
    written(tmp_path, "polyaccel.toml", "seed = 7")
    monkeypatch.chdir(tmp_path)
    assert resolve({}, {}).seed == 7
    assert resolve({}, {"POLYACCEL_CONFIG_FILE": "off"}).seed == 0


def test_the_users_file_is_read_where_the_folder_has_none(tmp_path, monkeypatch):
    (tmp_path / "polyaccel").mkdir()
    written(tmp_path / "polyaccel", "config.toml", "seed = 8")
    monkeypatch.chdir(tmp_path)
    assert resolve({}, {"XDG_CONFIG_HOME": str(tmp_path)}).seed == 8


def test_yaml_1_1_surprises_do_not_happen(tmp_path):
    path = written(tmp_path, "a.yaml", "mixed_precision: no\ncompile_backend: off\nseed: 010\n")
    assert read_file(path).values == {"mixed_precision": "no", "compile_backend": "off", "seed": 10}
    assert "is not an integer" in read_file(written(tmp_path, "b.yaml", "seed: 1e3")).problems[0]


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_all_mistakes_are_shown_at_once_with_line_and_nearest_name(tmp_path, suffix):
    text = {
        "toml": 'mixed_precison = "bf16"\nseed = "x"\n[mesh]\ntensor = "two"\n[launch]\nnum_machines = 0\n',
        "yaml": "mixed_precison: bf16\nseed: x\nmesh:\n  tensor: two\nlaunch:\n  num_machines: 0\n",
    }[suffix]
    path = written(tmp_path, f"a.{suffix}", text)
    with pytest.raises(ConfigError) as caught:
        resolve({}, environment_of(path))
    message = str(caught.value)
    assert "4 mistakes" in message
    assert f"{path}:1: mixed_precison is no setting: did you mean 'mixed_precision'?" in message
    assert f"{path}:2: seed='x' is not an integer" in message
    assert f"{path}:4: mesh.tensor='two' is not an integer" in message
    assert f"{path}:6: launch.num_machines=0 must be at least 1" in message.replace("'0'", "0")


def test_a_key_given_twice_is_a_mistake_in_both_languages(tmp_path):
    assert "given twice; first at" in read_file(written(tmp_path, "a.yaml", "seed: 1\nseed: 2\n")).problems[0]
    with pytest.raises(ConfigError, match=r"is not TOML.*line 2"):
        read_file(written(tmp_path, "a.toml", "seed = 1\nseed = 2\n"))


def test_a_launch_setting_outside_its_table_is_sent_there(tmp_path):
    assert (
        "did you mean 'launch.num_processes'" in read_file(written(tmp_path, "a.toml", "num_processes = 2")).problems[0]
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.toml", b"\xff\xfe", "not UTF-8"),
        ("a.toml", b"seed: 1", "is not TOML"),
        ("a.yaml", b"- 1\n- 2\n", "a sequence, not a mapping"),
        ("a.yaml", b"just words", "a scalar, not a mapping"),
        ("a.yaml", b"? [a, b]\n: 1\n", "cannot name a setting"),
        ("a.yaml", b"a: &x\n  b: *x\n", "contains itself"),
        ("a.yaml", b"a: [", "is not YAML"),
        ("a.toml", b"#" * (1 << 20) + b"#", "no configuration file"),
    ],
)
def test_what_is_no_configuration_is_refused_in_words(tmp_path, name, content, reason):
    with pytest.raises(ConfigError, match=reason):
        read_file(written(tmp_path, name, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml.*No such file"):
        resolve({}, environment_of(tmp_path / "nowhere.toml"))


def test_yaml_constructs_no_object(tmp_path):
    problems = read_file(written(tmp_path, "a.yaml", "seed: !!python/object/apply:os.getcwd []\n")).problems
    assert problems
    assert "seed" in problems[0]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
names = st.sampled_from([*SETTINGS, "mesh", "launch", "sead"]) | st.text(max_size=6)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)


@settings(deadline=None)  # a busy machine is no failure
@given(text=st.text(max_size=60) | st.binary(max_size=60), suffix=st.sampled_from(["toml", "yaml"]))
def test_no_text_makes_it_crash(tmp_path_factory, text, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    with contextlib.suppress(PolyaccelError):
        resolve({}, environment_of(path))


@settings(deadline=None)  # a busy machine is no failure
@given(tree=st.dictionaries(names, trees, max_size=5))
def test_no_tree_makes_it_crash(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    with contextlib.suppress(PolyaccelError):
        resolve({}, environment_of(path))


@settings(deadline=None)  # a busy machine is no failure
@given(arguments=st.dictionaries(names, trees, max_size=4))
def test_no_arguments_make_it_crash(arguments):
    with contextlib.suppress(PolyaccelError):
        resolve(arguments, {"POLYACCEL_CONFIG_FILE": "off"})
