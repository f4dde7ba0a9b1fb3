"""What is no longer named is gone at once: nobody waits for the garbage collector to get a device's memory back."""

import gc
import weakref

import torch
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator


def test_an_accelerator_and_what_it_prepared_go_with_their_last_names():
    gc.collect()
    gc.disable()
    try:
        accelerator = Accelerator(backend="torch", cpu=True, gradient_accumulation_steps=2)
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        loader = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
        named = (model, optimizer, loader, accelerator, accelerator.gradient_state)
        kept = [weakref.ref(each) for each in named]
        del accelerator, model, optimizer, loader, x, named
        assert [ref() for ref in kept if ref() is not None] == []
    finally:
        gc.enable()
