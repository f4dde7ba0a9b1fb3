"""What `polyaccel plan` says of GPT-2 124M in torch on v5e:2x4, over what XLA says of the same step written in jax by hand.

    python benchmarks/planned_by_hand.py           # writes benchmarks/results/planned_by_hand.json: five minutes on two cores
    python benchmarks/planned_by_hand.py --show    # prints what is there

The two are tests/adapter_jax/planned_gpt2.py and handwritten_gpt2.py. Needs polyaccel[tpu-plan] (or libtpu on PYTHONPATH), and no TPU.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "planned_by_hand.json"
MODELS = FOLDER.parent / "tests" / "adapter_jax"
TOPOLOGY = "v5e:2x4"


def planned():
    command = [sys.executable, "-m", "polyaccel.cli.main", "plan", str(MODELS / "planned_gpt2.py")]
    command += ["--topology", TOPOLOGY, "--mesh.fsdp", "-1", "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"peak": found["peak_bytes"], "temporary": found["temporary_bytes"], "flops": found["flops"]}


def by_hand():
    """In this process, which must not have opened jax before."""
    from polyaccel.planned.topologies import topology_named
    from polyaccel_jax.planning.devices import devices_of, environment

    topology = topology_named(TOPOLOGY)
    os.environ.update(environment(topology))
    sys.path.insert(0, str(MODELS))
    import handwritten_gpt2

    return handwritten_gpt2.figures(handwritten_gpt2.compiled(devices_of(topology), handwritten_gpt2.Size()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    if not parser.parse_args().show:
        one, two = planned(), by_hand()
        ratios = {name: round(one[name] / two[name], 4) for name in one}
        RESULTS.write_text(json.dumps({"planned": one, "by hand": two, "planned / by hand": ratios}, indent=2) + "\n")
    print(RESULTS.read_text(), end="")


if __name__ == "__main__":
    main()
