"""The suite's model in the torch dialect, for every engine that runs it."""

import numpy as np
import torch
from torch.utils.data import DataLoader


class Rows(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row], "y": self.y[row]}


class TorchCase:
    dialect = "torch"

    def __init__(self, backend):
        self.backend = backend

    def model(self, weight, bias):
        model = torch.nn.Linear(*weight.shape)
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(weight.T.copy()))
            model.bias.copy_(torch.from_numpy(bias))
        return model

    def optimizer(self, model, lr):
        return torch.optim.SGD(model.parameters(), lr=lr)

    def scheduler(self, optimizer, gamma):
        return "exponential" if optimizer is None else torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    def loader(self, x, y, batch_size):
        return DataLoader(Rows(x, y), batch_size=batch_size)

    def loss(self, model, batch):
        return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def parameters(self, model):
        return model.parameters()

    def array(self, values):
        return torch.from_numpy(np.array(values))

    def weights(self, model):
        return {
            "weight": model.weight.detach().cpu().numpy().T.copy(),
            "bias": model.bias.detach().cpu().numpy().copy(),
        }
