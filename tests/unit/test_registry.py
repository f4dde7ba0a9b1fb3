"""Finding a backend: unknown names, missing frameworks, and what "auto" means."""

import pytest

from polyaccel import Accelerator, registry, set_seed
from polyaccel.errors import BackendNotFoundError, BackendUnavailableError, ConfigError, LaunchError, PolyaccelError
from polyaccel.launch.rendezvous import Rendezvous, from_environment
from polyaccel.protocols import Probe


class Missing:
    name = "missing"

    def probe(self):
        return Probe(is_usable=False, reason="frob is not installed", cure="pip install frob")


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(BackendNotFoundError, match=r"backend='jaxx' is unknown\nhint: did you mean 'jax'\?"):
        Accelerator(backend="jaxx")


def test_a_missing_framework_names_the_command_that_cures_it(monkeypatch):
    monkeypatch.setitem(registry._registered, "missing", Missing())
    with pytest.raises(BackendUnavailableError, match="frob is not installed\nhint: pip install frob"):
        Accelerator(backend="missing")


def test_auto_prefers_the_framework_that_the_script_has_imported(monkeypatch):
    class Loaded:
        def __init__(self, name, is_loaded):
            self.name, self._loaded = name, is_loaded

        def probe(self):
            return Probe(is_usable=True, is_loaded=self._loaded)

    monkeypatch.setattr(registry, "backend_names", lambda: ["jax", "torch"])
    monkeypatch.setattr(registry, "load_backend", lambda name: Loaded(name, name == "jax"))
    assert registry.choose_backend("auto").name == "jax"
    monkeypatch.setattr(registry, "load_backend", lambda name: Loaded(name, False))
    assert registry.choose_backend("auto").name == "torch"


def test_errors_cross_process_boundaries_with_their_hint():
    import pickle

    error = pickle.loads(pickle.dumps(PolyaccelError("what", "how")))
    assert (error.message, error.hint, str(error)) == ("what", "how", "what\nhint: how")


def test_a_rendezvous_and_its_variables_are_the_same_value():
    place = Rendezvous(1, 4, 1, 2, "host", 29500)
    assert from_environment(place.environment()) == place
    assert from_environment({}) == Rendezvous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "outside a job of 4 processes"),
        ({"RANK": "x"}, "not a number"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
    ],
)
def test_a_broken_rendezvous_is_refused(change, message):
    environment = {**Rendezvous(1, 4, 1, 2, "host", 29500).environment(), **change}
    with pytest.raises(LaunchError, match=message):
        from_environment({name: value for name, value in environment.items() if value is not None})


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", True])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ConfigError, match="is not a seed"):
        set_seed(seed)
