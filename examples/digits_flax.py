"""Real scanned digits in Flax NNX and optax, in the function form: `loss = accelerator.backward(loss_fn, model, batch)`.

    polyaccel launch --backend jax examples/digits_flax.py
    JAX_NUM_CPU_DEVICES=4 polyaccel launch --backend jax --cpu examples/digits_flax.py     # four virtual devices
    polyaccel launch --backend torch --cpu examples/digits_flax.py                         # the same model on the torch engine

Data: scikit-learn's `load_digits`, 1797 scans of 8 x 8 pixels, as plain numpy batches.
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from curves import Curve
from flax import nnx
from sklearn.datasets import load_digits

from polyaccel import Accelerator, set_seed

GLOBAL_BATCH = 64


class CNN(nnx.Module):
    def __init__(self, dropout, rngs):
        self.conv1, self.norm1 = nnx.Conv(1, 32, (3, 3), rngs=rngs), nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.conv2, self.norm2 = nnx.Conv(32, 64, (3, 3), rngs=rngs), nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(64 * 2 * 2, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(images))), (2, 2), (2, 2))  # (batch, 4, 4, 32)
        x = nnx.max_pool(nnx.relu(self.norm2(self.conv2(x))), (2, 2), (2, 2))  # (batch, 2, 2, 64)
        return self.head(self.dropout(x.reshape(len(x), -1)))  # (batch, 10)


class Batches:
    """A loader is any iterable of numpy batches; this one shuffles by its own generator."""

    def __init__(self, images, labels, batch_size, rng=None):
        self.images, self.labels, self.batch_size, self.rng = images, labels, batch_size, rng

    def __len__(self):
        return len(self.images) // self.batch_size

    def __iter__(self):
        order = np.arange(len(self.images)) if self.rng is None else self.rng.permutation(len(self.images))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            rows = order[start : start + self.batch_size]
            yield {"image": self.images[rows], "label": self.labels[rows]}


def loss_fn(model, batch):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", help="jax, or torch through the bridge (default: what the launcher started, else jax)"
    )
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", help="write losses and speed to this JSON file")
    args = parser.parse_args()

    accelerator = Accelerator(backend=args.backend, mixed_precision=args.mixed_precision, split_batches=True)
    set_seed(args.seed)
    digits = load_digits()
    images = digits.images[..., None].astype(np.float32) / 16  # (1797, 8, 8, 1)
    labels = digits.target.astype(np.int32)
    train_loader = Batches(images[:1437], labels[:1437], GLOBAL_BATCH, np.random.default_rng(args.seed))
    test_loader = Batches(images[1437:], labels[1437:], 8)
    model = CNN(args.dropout, nnx.Rngs(args.seed))
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)

    model, optimizer = accelerator.prepare(model, optimizer)
    train_loader, test_loader = (
        accelerator.prepare_data_loader(train_loader),
        accelerator.prepare_data_loader(test_loader),
    )
    accelerator.print(accelerator)

    curve = Curve(
        args.curve, task="digits CNN (flax)", backend=accelerator.backend, devices=accelerator.num_data_shards
    )
    for epoch in range(args.epochs):
        model.train()
        for batch in accelerator.progress(train_loader, description=f"epoch {epoch + 1}/{args.epochs}"):
            loss = accelerator.backward(loss_fn, model, batch)
            optimizer.step()
            optimizer.zero_grad()
            curve.add(loss)
    curve.stop()

    model.eval()
    correct = total = 0
    for batch in test_loader:
        predictions = jnp.argmax(model(batch["image"]), -1)
        predictions, truth = accelerator.gather_for_metrics((predictions, batch["label"]))
        correct += int((predictions == truth).sum())
        total += len(truth)
    accelerator.print(
        f"final loss {float(curve.losses[-1]):.4f}, accuracy {correct / total:.3f} on {total} held-out scans"
    )
    if accelerator.is_main_process:
        curve.save(accuracy=correct / total)
    accelerator.end_training()


if __name__ == "__main__":
    main()
