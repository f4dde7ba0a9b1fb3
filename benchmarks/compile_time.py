"""What a first step costs: capture, trace and compile of real shapes from a torch script, beside the same model hand-written in JAX.

    python benchmarks/compile_time.py                          # GPT-2 and BERT-base, 12 layers; JSON in benchmarks/results/
    python benchmarks/compile_time.py --models gpt2 --layers 12 24 48 --rounds 1

Each start is a process of its own, and the contenders take turns. The result is the first step less the second one: seconds until
the first update, without its arithmetic. Hand-written: plain jnp with a Python loop over the layers, `jax.value_and_grad`, optax.adamw,
one donated `jax.jit`. The second start of polyaccel finds the persistent compilation cache that a first one filled.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interleaved import save

WIDTH, HEADS, BATCH, TIME = 768, 12, 2, 64
VOCAB = {"gpt2": 50257, "bert": 30522}
POSITIONS = {"gpt2": 1024, "bert": 512}
HAND, FIRST, SECOND = "hand-written JAX", "polyaccel, torch on jax", "polyaccel, second start"


# -- one start, in a process of its own ----------------------------------------------------------------------------------------


def polyaccel_step(kind, num_layers, cache):
    import torch
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    from polyaccel import Accelerator

    torch.set_num_threads(1)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=num_layers, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    else:
        config = BertConfig(num_hidden_layers=num_layers, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        model = BertForMaskedLM(config)
    accelerator = Accelerator(backend="jax", cpu=True, compilation_cache=cache or "off")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    step = accelerator.train_step(lambda model, ids: model(input_ids=ids, labels=ids).loss, model, optimizer)
    ids = torch.zeros((BATCH, TIME), dtype=torch.int64)

    def run():
        step(ids)
        accelerator._engine.synchronize()

    return run


def hand_written_step(kind, num_layers):
    import jax
    import jax.numpy as jnp
    import optax

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    def dense_params(num_in, num_out):
        return {"weight": zeros(num_in, num_out), "bias": zeros(num_out)}

    def norm_params():
        return {"weight": zeros(WIDTH), "bias": zeros(WIDTH)}

    def block_params():
        qkv = {"qkv": dense_params(WIDTH, 3 * WIDTH)}
        if kind == "bert":
            qkv = {name: dense_params(WIDTH, WIDTH) for name in ("query", "key", "value")}
        up, down = dense_params(WIDTH, 4 * WIDTH), dense_params(4 * WIDTH, WIDTH)
        norms = {"norm1": norm_params(), "norm2": norm_params()}
        return {**qkv, "out": dense_params(WIDTH, WIDTH), "up": up, "down": down, **norms}

    params = {
        "token": zeros(VOCAB[kind], WIDTH),
        "position": zeros(POSITIONS[kind], WIDTH),
        "norm": norm_params(),
        "blocks": [block_params() for _ in range(num_layers)],
    }
    if kind == "bert":
        params |= {"segment": zeros(2, WIDTH), "head": dense_params(WIDTH, WIDTH), "head_norm": norm_params()}
        params["head_bias"] = zeros(VOCAB[kind])

    def dense(x, p):
        return x @ p["weight"] + p["bias"]

    def norm(x, p):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * p["weight"] + p["bias"]

    def attention(q, k, v, is_causal):
        q, k, v = (x.reshape(*x.shape[:2], HEADS, -1) for x in (q, k, v))  # (batch, time, heads, head)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5  # (batch, heads, time, time)
        if is_causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(*q.shape[:2], -1)

    def gpt2_loss(p, ids):
        ids, targets = ids[:, :-1], ids[:, 1:]
        x = p["token"][ids] + p["position"][: ids.shape[1]]  # (batch, time, width)
        for block in p["blocks"]:
            q, k, v = jnp.split(dense(norm(x, block["norm1"]), block["qkv"]), 3, -1)
            x = x + dense(attention(q, k, v, True), block["out"])
            x = x + dense(jax.nn.gelu(dense(norm(x, block["norm2"]), block["up"])), block["down"])
        logits = norm(x, p["norm"]) @ p["token"].T  # (batch, time, vocabulary)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def gelu(x):
        return jax.nn.gelu(x, approximate=False)

    def bert_loss(p, ids):
        x = p["token"][ids] + p["position"][: ids.shape[1]] + p["segment"][jnp.zeros_like(ids)]
        x = norm(x, p["norm"])  # (batch, time, width)
        for block in p["blocks"]:
            q, k, v = (dense(x, block[name]) for name in ("query", "key", "value"))
            x = norm(x + dense(attention(q, k, v, False), block["out"]), block["norm1"])
            x = norm(x + dense(gelu(dense(x, block["up"])), block["down"]), block["norm2"])
        hidden = norm(gelu(dense(x, p["head"])), p["head_norm"])
        logits = hidden @ p["token"].T + p["head_bias"]  # (batch, time, vocabulary)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    loss = {"gpt2": gpt2_loss, "bert": bert_loss}[kind]
    tx = optax.adamw(1e-4)

    def step(state, ids):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, ids)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    jitted = jax.jit(step, donate_argnums=0)
    ids = jnp.zeros((BATCH, TIME + (kind == "gpt2")), jnp.int32)
    held = [(params, tx.init(params))]
    del params

    def run():
        held[0], _ = jitted(held[0], ids)
        jax.block_until_ready(held[0])

    return run


def one_start(kind, num_layers, contender, cache):
    """Seconds and CPU seconds of the first step less those of the second."""
    run = hand_written_step(kind, num_layers) if contender == HAND else polyaccel_step(kind, num_layers, cache)
    times = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    (wall, cpu), (step_wall, step_cpu) = times
    print(json.dumps({"wall_s": wall - step_wall, "cpu_s": cpu - step_cpu, "step_cpu_s": step_cpu}))


# -- all of them ---------------------------------------------------------------------------------------------------------------


def started(kind, num_layers, contender, cache):
    command = [sys.executable, __file__, "--start", kind, str(num_layers), contender, cache]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(kind, num_layers, rounds):
    """Medians per contender, and ratios to the hand-written model within each round."""
    found = {HAND: [], FIRST: [], SECOND: []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for contender in found:
                found[contender].append(started(kind, num_layers, contender, "" if contender == HAND else cache))
    rows = {}
    print(f"\n{kind}, {num_layers} layers\n{'':24}  wall s  cpu s  ratio wall  ratio cpu")
    for contender, times in found.items():
        row = {name: statistics.median(one[name] for one in times) for name in ("wall_s", "cpu_s", "step_cpu_s")}
        for name in ("wall", "cpu"):
            pairs = zip(times, found[HAND], strict=True)
            row[f"ratio_{name}"] = statistics.median(mine[f"{name}_s"] / hand[f"{name}_s"] for mine, hand in pairs)
        rows[contender] = row
        print(
            f"{contender:24}  {row['wall_s']:6.1f}  {row['cpu_s']:5.1f}  {row['ratio_wall']:10.2f}  {row['ratio_cpu']:9.2f}"
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=VOCAB, default=list(VOCAB))
    parser.add_argument("--layers", nargs="+", type=int, default=[12])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "compile_time.json"))
    args = parser.parse_args()
    if args.start:
        kind, num_layers, contender, cache = args.start
        one_start(kind, int(num_layers), contender, cache)
        return
    names = ("torch", "transformers", "jax", "optax")
    results = {"versions": {name: importlib.metadata.version(name) for name in names}, "rounds": args.rounds}
    for kind in args.models:
        for num_layers in args.layers:
            results[f"{kind}, {num_layers} layers"] = measure(kind, num_layers, args.rounds)
    save(args.output, results)


if __name__ == "__main__":
    main()
