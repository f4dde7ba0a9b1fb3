"""Real scanned digits, a CNN with BatchNorm and dropout, a plain Accelerate loop in PyTorch: `accelerator.backward(loss)`.

    polyaccel launch --backend torch examples/digits_cnn.py
    polyaccel launch --backend torch --num-processes 2 --cpu examples/digits_cnn.py     # DDP, same global batch
    polyaccel launch --backend jax examples/digits_cnn.py
    JAX_NUM_CPU_DEVICES=4 polyaccel launch --backend jax --cpu examples/digits_cnn.py    # four virtual devices
    polyaccel launch --backend xla examples/digits_cnn.py                                # in the xla environment

`python examples/digits_cnn.py --backend jax` does the same for one process. Every run is a folder below runs/ (`polyaccel runs list`);
`--log-with tensorboard wandb` logs there too. Data: scikit-learn's `load_digits`, 1797 scans of 8 x 8 pixels (UCI Optical Recognition
of Handwritten Digits), nothing is downloaded.
"""

import argparse

import torch
import torch.nn.functional as F
from curves import Curve
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator, set_seed

GLOBAL_BATCH = 64


class CNN(nn.Module):
    # Smooth activations and average pooling: at the kink of a ReLU or the tie of a max pool, the last bit of a float decides where the
    # gradient goes, and curves of different engines would part for no better reason.
    def __init__(self, dropout):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(64 * 2 * 2, 10)

    def forward(self, images):
        x = F.avg_pool2d(F.gelu(self.norm1(self.conv1(images))), 2)  # (batch, 32, 4, 4)
        x = F.avg_pool2d(F.gelu(self.norm2(self.conv2(x))), 2)  # (batch, 64, 2, 2)
        return self.head(self.dropout(x.flatten(1)))  # (batch, 10)


def datasets():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="torch, xla or jax (default: what the launcher started, else torch)")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", help="write losses and speed to this JSON file")
    parser.add_argument(
        "--log-with", nargs="*", default=[], help="trackers beside the run folder: tensorboard, wandb, ..."
    )
    parser.add_argument("--project-dir", help="the run folder is made below its runs/ (default: ./runs)")
    args = parser.parse_args()

    accelerator = Accelerator(
        backend=args.backend,
        mixed_precision=args.mixed_precision,
        log_with=args.log_with,
        project_dir=args.project_dir,
    )
    accelerator.init_trackers("digits-cnn", config=vars(args))  # `polyaccel runs list` shows it
    set_seed(args.seed)
    train_set, test_set = datasets()
    per_shard = GLOBAL_BATCH // accelerator.num_data_shards  # the same global batch on any number of devices
    train_loader = DataLoader(train_set, batch_size=per_shard, shuffle=True, drop_last=True)
    test_loader = DataLoader(test_set, batch_size=per_shard)
    model = CNN(args.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    accelerator.print(accelerator)

    curve = Curve(args.curve, task="digits CNN", backend=accelerator.backend, devices=accelerator.num_data_shards)
    step = 0
    for epoch in range(args.epochs):
        model.train()
        for images, labels in accelerator.progress(train_loader, description=f"epoch {epoch + 1}/{args.epochs}"):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            mean_loss = accelerator.reduce(loss.detach(), "mean")
            accelerator.log({"loss": mean_loss, "epoch": epoch}, step=step)  # waits for no device
            curve.add(mean_loss)
            step += 1
    curve.stop()

    model.eval()
    correct = total = 0
    for images, labels in test_loader:
        with torch.no_grad():
            predictions = model(images).argmax(-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, labels))
        correct += (predictions == labels).sum().item()
        total += len(labels)
    accelerator.print(
        f"final loss {float(curve.losses[-1]):.4f}, accuracy {correct / total:.3f} on {total} held-out scans"
    )
    accelerator.log({"accuracy": correct / total}, step=step)
    if accelerator.is_main_process:
        curve.save(accuracy=correct / total)
    accelerator.end_training()


if __name__ == "__main__":
    main()
