"""`polyaccel compare` on real engines."""

import re

import pytest

from polyaccel.cli.main import main

SCRIPT = """
import sys

import torch
from polyaccel import Accelerator, set_seed
from torch.utils.data import DataLoader, TensorDataset

assert sys.argv[1:] == ["--lr", "0.1", "--api-key", "arg-0a1b2c3d4e5f"], sys.argv
accelerator = Accelerator()
set_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
x = torch.randn(64, 4)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(100):
    for inputs, targets in loader:
        loss = (model(inputs) - targets).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
raise AssertionError("the script was to be ended before")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    return "train.py"


def test_one_script_agrees_on_torch_and_jax_and_the_page_says_so(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jax")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # as many data shards as torch has
    flags = ["--cpu", "--backends", "torch,jax", "--steps", "12", "-o", "page.html", "--keep", "kept"]
    monkeypatch.setenv("WANDB_API_KEY", "e1v-9f8a7b6c5d4e")
    code = main(["compare", *flags, script, "--", "--lr", "0.1", "--api-key", "arg-0a1b2c3d4e5f"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.splitlines()[-1].startswith(
        "safe to switch from torch to jax, as far as 12 steps show: 12 losses, gradient norms"
    )
    assert re.search(r"first diverging step +none", out)
    assert re.search(r"steps +12 +12", out)
    assert re.search(r"compile time +- +[\d.]+ s, \d+ programs", out)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<polyline") >= 4
    assert "safe to switch" in page
    assert {file.name for file in (tmp_path / "kept").iterdir()} == {"torch", "jax"}
    assert "--api-key [redacted]" in page
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "train.py"]
    assert len(written) > 8
    for secret in (b"arg-0a1b2c3d4e5f", b"e1v-9f8a7b6c5d4e"):
        assert [file.name for file in written if secret in file.read_bytes()] == []
        assert secret.decode() not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backends", "torch", "train.py"], "names no two engines"),
        (["--backends", "torch,torch", "train.py"], "names no two engines"),
        (["--backends", "torch,jax", "--steps", "-1", "train.py"], "is below 0"),
        (["--backends", "torch,jax", "nothing.py"], "does not exist"),
        (["--backends", "torch,jax", "broken.py"], "failed on torch with exit code 7"),
        (["--backends", "torch,jax", "empty.py"], "recorded nothing on torch"),
    ],
)
def test_what_cannot_be_compared_is_refused(script, tmp_path, capsys, arguments, said):
    (tmp_path / "broken.py").write_text("raise SystemExit(7)")
    (tmp_path / "empty.py").write_text("")
    assert main(["compare", *arguments]) == 1
    assert said in capsys.readouterr().err
