"""One training of benchmarks/scaling.py: a GPT of either dialect, whose mesh comes from the configuration.

`polyaccel plan` takes it as it is. With --report it trains a few steps and writes what one device holds, and what jax compiled; with
--several it does so for one mesh after the other, in one process.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

CONTEXT, VOCABULARY = 64, 256


def flax_model(layers, width, remat):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
                nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4)
            )
            self.up_proj = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down_proj = nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x):  # (batch, time, width)
            y = self.norm1(x)
            q, k, v = (part(y).reshape(*y.shape[:2], 4, -1) for part in (self.q_proj, self.k_proj, self.v_proj))
            x = x + self.o_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
            return x + self.down_proj(nnx.gelu(self.up_proj(self.norm2(x))))

    class GPT(nnx.Module):
        """The one of examples/mesh_gpt.py. `scan`: its layers are one, stacked, and compiled once."""

        def __init__(self, rngs, scan=False):
            self.embed_tokens = nnx.Embed(VOCABULARY, width, rngs=rngs)
            self.embed_positions = nnx.Embed(CONTEXT, width, rngs=rngs)
            self.scan = scan
            if scan:
                self.blocks = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(layers))
            else:
                self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
            self.norm = nnx.LayerNorm(width, rngs=rngs)
            self.lm_head = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

        def __call__(self, ids):
            x = self.embed_tokens(ids) + self.embed_positions(jnp.arange(ids.shape[1]))
            if self.scan:
                turn = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
                return self.lm_head(self.norm(turn(x, self.blocks)))
            call = nnx.remat(lambda block, x: block(x)) if remat else lambda block, x: block(x)
            for block in self.blocks:
                x = call(block, x)
            return self.lm_head(self.norm(x))

    return GPT


def flax_training(accelerator, args):
    import numpy as np
    import optax
    from flax import nnx

    make = flax_model(args.layers, args.width, args.remat)
    model = accelerator.create_model(lambda: make(nnx.Rngs(0), args.scan))
    model, optimizer = accelerator.prepare(model, optax.adamw(1e-3))

    def loss_fn(model, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()

    step = accelerator.train_step(loss_fn, model, optimizer, max_grad_norm=1.0)
    tokens = np.zeros((args.global_batch, CONTEXT), np.int32)
    return lambda: step({"x": tokens, "y": tokens}), (model, optimizer)


def torch_training(accelerator, args):
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from mesh_gpt import GPT, next_byte_loss

    torch.set_num_threads(1)
    model = accelerator.prepare(accelerator.create_model(lambda: GPT(layers=args.layers, width=args.width)))
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-3))
    tokens = torch.zeros((args.global_batch, CONTEXT), dtype=torch.int64)
    batch = (tokens, tokens)
    if args.form == "fused":
        step = accelerator.train_step(next_byte_loss, model, optimizer, max_grad_norm=1.0)
        return lambda: step(batch), (model, optimizer)

    def step():
        if args.form == "loss":
            loss = next_byte_loss(model, batch)
            accelerator.backward(loss)
        else:
            loss = accelerator.backward(next_byte_loss, model, batch)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, (model, optimizer)


class Programs:
    """Stands where the engine runs its programs: compiles each by itself, notes how long that took, and runs what came out."""

    def __init__(self, engine):
        self.known, self.runs = {}, {}
        self.trace_s = self.compile_s = self.trace_cpu_s = self.compile_cpu_s = 0.0
        self.log = engine.compiles
        engine.compiles.run = self.run

    def run(self, function, *args):
        import jax

        leaves, structure = jax.tree.flatten(args)
        key = (id(function), structure, tuple((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves))
        if key not in self.known:
            times = [(time.perf_counter(), time.process_time())]
            lowered = function.trace(*args).lower()
            times.append((time.perf_counter(), time.process_time()))
            self.known[key] = (lowered.compile(), function)
            times.append((time.perf_counter(), time.process_time()))
            (start, start_cpu), (traced, traced_cpu), (end, end_cpu) = times
            self.trace_s, self.compile_s = self.trace_s + traced - start, self.compile_s + end - traced
            self.trace_cpu_s += traced_cpu - start_cpu
            self.compile_cpu_s += end_cpu - traced_cpu
        self.runs[key] = self.runs.get(key, 0) + 1
        return self.known[key][0](*args)

    def of_one_step(self, step):
        """The programs that a step runs, as (compiled, times)."""
        self.runs = {}
        step()
        return [(self.known[key][0], times) for key, times in self.runs.items()]


def on_first_device(arrays):
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def host_peak(step):
    """Bytes by which this process grew at most during a step, whatever it held before."""
    status = Path("/proc/self/status")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = number_of(status.read_text(), "VmRSS")
    step()
    return number_of(status.read_text(), "VmHWM") - before


def number_of(text, name):
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def report_of(step, programs):
    import jax

    from polyaccel_jax.handles import JaxModel, JaxOptimizer
    from polyaccel_jax.planning.hlo import collectives_of

    for _ in range(2):
        float(step())
    in_step = programs.of_one_step(lambda: float(step()))
    held = gc.get_objects()
    (model,), (optimizer,) = ([one for one in held if type(one) is kind] for kind in (JaxModel, JaxOptimizer))
    first = jax.devices()[0]
    live = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
        if shard.device == first
    }
    sent = {}
    for compiled, times in in_step:
        for one in collectives_of(compiled.as_text()):
            found = sent.setdefault(one.kind, {"count": 0, "sent_bytes": 0})
            found["count"] += one.count * times
            found["sent_bytes"] += one.sent_bytes * times
    memory = [compiled.memory_analysis() for compiled, _ in in_step]
    return {
        "num_parameters": sum(leaf.size for leaf in model.leaves),
        "capture_s": programs.log._capture_s,
        "trace_s": programs.trace_s,
        "compile_s": programs.compile_s,
        "trace_cpu_s": programs.trace_cpu_s,
        "compile_cpu_s": programs.compile_cpu_s,
        "parameter_bytes": on_first_device(model.leaves),
        "optimizer_bytes": on_first_device(optimizer.leaves),
        "live_bytes": sum(live.values()),
        "temporary_bytes": max(one.temp_size_in_bytes for one in memory),
        "host_peak_bytes": host_peak(lambda: float(step())),
        "flops": sum((compiled.cost_analysis() or {}).get("flops", 0.0) * times for compiled, times in in_step),
        "programs": sum(times for _, times in in_step),
        "collectives": sent,
    }


def options_of(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialect", choices=["torch", "flax"], default="torch")
    parser.add_argument("--form", choices=["loss", "function", "fused"], default="fused", help="of a torch script")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--scan", action="store_true", help="flax: the layers are one, stacked")
    parser.add_argument("--remat", action="store_true", help="flax: activations of a layer are computed again")
    parser.add_argument("--report", help="train three steps and write this JSON file")
    parser.add_argument("--several", help="a JSON file of [mesh, arguments] pairs")
    return parser.parse_args(arguments)


def train(args, **settings):
    if args.dialect == "torch":
        import torch  # noqa: F401 - tells `polyaccel plan` that modules are torch's

    from polyaccel import Accelerator

    accelerator = Accelerator(split_batches=True, compilation_cache="off", **settings)
    programs = Programs(accelerator._engine) if args.report else None
    step, prepared = {"torch": torch_training, "flax": flax_training}[args.dialect](accelerator, args)
    if programs is None:
        float(step())
    else:
        Path(args.report).write_text(json.dumps(report_of(step, programs)))
    del prepared  # which had to live until here
    accelerator.end_training()


def main():
    args = options_of()
    if not args.several:
        train(args)
        return
    from polyaccel.state import AcceleratorState

    for mesh, arguments in json.loads(Path(args.several).read_text()):
        train(options_of(arguments), backend="jax", cpu=True, mesh=mesh)
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()  # arrays of this run must not count in the next one


if __name__ == "__main__":
    main()
