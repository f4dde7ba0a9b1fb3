"""What a plan says of a transformers GPT-2, held against a step that is written in jax by hand."""

from __future__ import annotations

import json

import handwritten_gpt2
import jax
import pytest

from polyaccel.cli.main import main

pytest.importorskip("transformers", reason="the model that is planned is a GPT-2 of transformers")

SIZE = handwritten_gpt2.Size(layers=2, width=128, heads=2, vocab=2048, length=256, batch=2)
SCRIPT = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from polyaccel import Accelerator

layers, width, heads, vocab, length, batch = {numbers}
accelerator = Accelerator(mixed_precision="bf16")
config = GPT2Config(
    n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=length,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
)
model = GPT2LMHeadModel(config)
assert all(p.is_meta for p in model.parameters())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
tokens = torch.zeros(64, length, dtype=torch.int64)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=batch)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
step = accelerator.train_step(lambda model, batch: model(input_ids=batch[0], labels=batch[0]).loss, model, optimizer)
for batch in loader:
    step(batch)
"""


def test_operations_memory_and_exchanges_are_those_of_a_step_written_by_hand(tmp_path, capsys):
    script = tmp_path / "train.py"
    numbers = (SIZE.layers, SIZE.width, SIZE.heads, SIZE.vocab, SIZE.length, SIZE.batch)
    script.write_text(SCRIPT.format(numbers=numbers), "utf-8")
    assert main(["plan", str(script), "--topology", "cpu:4", "--mesh.fsdp", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    program = handwritten_gpt2.compiled(jax.devices()[:4], SIZE)
    by_hand = handwritten_gpt2.figures(program)
    assert plan["flops"] == pytest.approx(by_hand["flops"], rel=0.03)
    assert plan["peak_bytes"] == pytest.approx(by_hand["peak"], rel=0.03)
    kinds = {one["kind"]: one["bytes"] for one in plan["collectives"]}
    weights = 4 * plan["num_parameters"]
    table = 4 * SIZE.vocab * SIZE.width  # gathered in float32 for its rows, and as the head in bfloat16
    assert kinds == {"all-gather": weights + table, "reduce-scatter": weights, "all-reduce": 4}  # the loss
