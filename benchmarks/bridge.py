"""Training steps of three models: torch, torch.compile, polyaccel on torch and on jax from the torch script, and JAX by hand.

    python benchmarks/bridge.py                       # GPT 4 x 256, BERT-mini, ResNet-18; JSON in benchmarks/results/
    python benchmarks/bridge.py --only gpt --rounds 5
    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/bridge.py --device cuda    # also GPT-2 124M: tokens/s and MFU

Every contender starts from the same weights and its first losses are compared before anything is timed. Blocks of steps run in turn, and
each block ends when the updated parameters are there. The ratios are to the faster of the JAX steps by hand.
"""

import argparse
import functools
import importlib.metadata
import math
import os
import shutil
import statistics
import time
from pathlib import Path

import bridge_jax_models as by_hand
import bridge_torch_models as models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from interleaved import Contender, race, report, save
from torch.utils.data import DataLoader

from polyaccel import Accelerator
from polyaccel.looking.devices import peak_of

LEARNING_RATE = 1e-4


class Case:
    """One model: how to make it in torch, its loss in torch and in JAX, and one batch as numpy arrays."""

    def __init__(self, title, make, torch_loss, jax_losses, batch, *, precision="no", tokens=None):
        self.title, self.make, self.torch_loss, self.jax_losses = title, make, torch_loss, jax_losses
        self.batch, self.precision, self.tokens = batch, precision, tokens

    def model(self):
        torch.manual_seed(0)
        return self.make()


def adamw(model, **flags):
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **flags)


class Step:
    """A contender: `step()` returns the loss, unread."""

    def __init__(self, name, step, wait):
        self.name, self.step, self.wait = name, step, wait

    def first_loss(self):
        loss = float(self.step())
        self.wait()
        return loss


def torch_step(case, device, *, compiled):
    model = case.model().to(device)
    optimizer = adamw(model, fused=True)
    batch = {name: torch.from_numpy(value).to(device) for name, value in case.batch.items()}
    loss_of = torch.compile(case.torch_loss) if compiled else case.torch_loss
    is_narrow = case.precision == "bf16"

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=is_narrow):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Step("torch.compile" if compiled else "torch eager", step, wait)


def polyaccel_step(case, device, backend):
    accelerator = Accelerator(backend=backend, cpu=device == "cpu", mixed_precision=case.precision)
    model = case.model()
    rows = [{name: value[index] for name, value in case.batch.items()} for index in range(len(case.batch["rows"]))]
    loader = DataLoader([{n: v for n, v in row.items() if n != "rows"} for row in rows], batch_size=len(rows))
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    (batch,) = loader
    step = accelerator.train_step(case.torch_loss, model, optimizer)
    return Step(f"polyaccel {backend}", lambda: step(batch), accelerator._engine.synchronize)


def jax_step(case, name, loss_of):
    params, statistics_ = by_hand.params_of(case.model())
    tx = optax.adamw(LEARNING_RATE, weight_decay=1e-2)
    state = [params, statistics_, tx.init(params)]
    batch = {key: jnp.asarray(_channels_last(value)) for key, value in case.batch.items() if key != "rows"}
    precision = jnp.bfloat16 if case.precision == "bf16" else jnp.float32

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, running, opt_state, batch):
        loss_fn = functools.partial(loss_of, precision=precision)
        (loss, running), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, running, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), running, opt_state, loss

    def step():
        *state[:], loss = update(*state, batch)
        return loss

    return Step(name, step, lambda: jax.block_until_ready(state))


def _channels_last(value):
    value = value.astype(np.int32) if value.dtype == np.int64 else value
    return np.ascontiguousarray(np.moveaxis(value, 1, -1)) if value.ndim == 4 else value


def why_not_compiled(device):
    """Why torch.compile cannot run here; None where it can."""
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return "no C++ compiler on this machine"
    return None


# -- the models --------------------------------------------------------------------------------------------------------------


def _attentions(device):
    found = {"einsum attention": by_hand.plain_attention, "jax.nn.dot_product_attention": by_hand.library_attention}
    if device == "cuda":
        found["cudnn attention"] = functools.partial(by_hand.library_attention, implementation="cudnn")
    return found


def gpt_case(device, *, title, layers, heads, width, vocabulary, rows, time_, precision="no"):
    window = np.random.default_rng(0).integers(0, vocabulary, (rows, time_ + 1))
    losses = {
        f"jax by hand, {name}": functools.partial(by_hand.gpt_loss, layers=layers, heads=heads, attention=attention)
        for name, attention in _attentions(device).items()
        if precision != "no" or name != "cudnn attention"  # which takes 16-bit types only
    }
    return Case(
        title,
        lambda: models.GPT(layers, heads, width, vocabulary, time_),
        models.gpt_loss,
        losses,
        {"ids": window[:, :-1].copy(), "targets": window[:, 1:].copy(), "rows": np.arange(rows)},
        precision=precision,
        tokens=rows * time_,
    )


def bert_case(device):
    rows, length, vocabulary = (8, 128, 30522) if device == "cpu" else (64, 128, 30522)
    random = np.random.default_rng(0)
    ids = random.integers(1, vocabulary, (rows, length))
    for row, size in enumerate(random.integers(length // 2, length + 1, rows)):
        ids[row, size:] = 0  # padding
    losses = {
        f"jax by hand, {name}": functools.partial(by_hand.bert_loss, layers=4, heads=4, attention=attention)
        for name, attention in _attentions("cpu").items()
    }
    return Case(
        f"BERT-mini (4 x 256), {rows} x {length} tokens",
        lambda: models.Bert(4, 4, 256, vocabulary, length),
        models.bert_loss,
        losses,
        {"ids": ids, "label": random.integers(0, 2, rows), "rows": np.arange(rows)},
        tokens=rows * length,
    )


def resnet_case(device):
    rows, size = (16, 64) if device == "cpu" else (128, 224)
    random = np.random.default_rng(0)
    images = random.normal(size=(rows, 3, size, size)).astype(np.float32)
    return Case(
        f"ResNet-18, {rows} images of {size} x {size}",
        models.ResNet18,
        models.resnet_loss,
        {"jax by hand, NHWC": by_hand.resnet_loss},
        {"images": images, "label": random.integers(0, 100, rows), "rows": np.arange(rows)},
    )


CASES = {
    "gpt": lambda device: gpt_case(
        device,
        title="GPT 4 x 256, 8 x 128 tokens",
        layers=4,
        heads=8,
        width=256,
        vocabulary=1024,
        rows=8 if device == "cpu" else 64,
        time_=128,
    ),
    "bert": bert_case,
    "resnet": resnet_case,
    "gpt2": lambda device: gpt_case(
        device,
        title="GPT-2 124M, bf16, 16 x 1024 tokens",
        layers=12,
        heads=12,
        width=768,
        vocabulary=50304,
        rows=16,
        time_=1024,
        precision="bf16",
    ),
}


# -- the run -----------------------------------------------------------------------------------------------------------------


def contenders_of(case, device):
    """(contenders, why some are missing). Raises SystemExit where one computes another loss than torch."""
    missing = {}
    steps = [torch_step(case, device, compiled=False)]
    reason = why_not_compiled(device)
    if reason is None:
        steps.append(torch_step(case, device, compiled=True))
    else:
        missing["torch.compile"] = reason
    steps += [polyaccel_step(case, device, backend) for backend in ("torch", "jax")]
    steps += [jax_step(case, name, loss_of) for name, loss_of in case.jax_losses.items()]
    tolerance = 1e-4 if case.precision == "no" and device == "cpu" else 2e-2
    expected, seconds = None, {}
    for step in steps:
        begin = time.perf_counter()
        loss = step.first_loss()
        seconds[step.name] = time.perf_counter() - begin
        expected = loss if expected is None else expected
        if not math.isclose(loss, expected, rel_tol=tolerance):
            raise SystemExit(f"{case.title}: {step.name} has a first loss of {loss}, and torch of {expected}")
    return [Contender(step.name, step.step, step.wait) for step in steps], missing, seconds


def run_case(case, device, *, rounds, steps):
    contenders, missing, seconds = contenders_of(case, device)
    race(contenders, rounds=rounds, steps=steps, warm_up=2)
    hands = [contender for contender in contenders if contender.name.startswith("jax by hand")]
    baseline = min(hands, key=lambda contender: statistics.median(contender.wall)).name
    rows = report(f"{case.title}; ratios to {baseline}", contenders, baseline)
    for name, row in rows.items():
        row["first_step_s"] = seconds[name]
        if case.tokens:
            row["tokens_per_s"] = case.tokens / row["wall_us"] * 1e6
    for name, reason in missing.items():
        print(f"{name}: left out, {reason}")
    return {"baseline": baseline, "left_out": missing, "rows": rows}


def add_utilisation(case, rows, peak):
    """MFU of a GPT: six operations per parameter and token, and those of attention (PaLM, appendix B), over the device's peak."""
    model = case.model()
    layers, width, time_ = len(model.blocks), model.token.weight.shape[1], model.position.weight.shape[0]
    parameters = sum(p.numel() for p in model.parameters()) - model.position.weight.numel()
    per_token = 6 * parameters + 12 * layers * width * time_
    for name, row in rows.items():
        row["mfu"] = row["tokens_per_s"] * per_token / peak
        print(f"{name}: {row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=2, help="steps per block")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch; XLA takes all cores")
    parser.add_argument("--peak-tflops", type=float, help="16-bit peak of the device, where its name is not known here")
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ("torch", "jax", "optax")
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    results = {
        "device": device_name,
        "jax_device": str(jax.devices(args.device)[0]),
        "threads": args.threads,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    wanted = args.only or [name for name in CASES if name != "gpt2" or args.device == "cuda"]
    for name in wanted:
        case = CASES[name](args.device)
        result = results[name] = run_case(case, args.device, rounds=args.rounds, steps=args.steps)
        if name == "gpt2":
            known = peak_of(device_name)
            if not args.peak_tflops and known is None:
                print(f"MFU: left out, the peak of {device_name} is not known; give --peak-tflops")
            else:
                add_utilisation(case, result["rows"], args.peak_tflops * 1e12 if args.peak_tflops else known.flops)
    default = Path(__file__).parent / "results" / ("bridge.json" if args.device == "cpu" else "bridge_cuda.json")
    save(args.output or default, results)


if __name__ == "__main__":
    main()
