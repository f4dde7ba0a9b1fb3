"""A script of Accelerate's: what its users write, in its public names alone. Its last line has every number as JSON."""

import json
import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration, gather_object, send_to_device, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

logger = get_logger(__name__)


class History(GeneralTracker):
    name = "history"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.lines.append(values)

    def log(self, values, step=None, **kwargs):
        self.lines.append([step, values])


class Count:
    def __init__(self):
        self.updates = 0

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def digits(count):
    inputs = torch.randn(count, 8)
    return TensorDataset(inputs, (inputs[:, :3].sum(1) > 0).long())


def values(state):
    return {name: value.tolist() for name, value in state.items()}


def main(folder):
    history = History()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        log_with=history,
        project_config=ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    train = DataLoader(digits(22), batch_size=4, shuffle=True)
    test = DataLoader(digits(11), batch_size=4)
    model, optimizer, train, test, scheduler = accelerator.prepare(model, optimizer, train, test, scheduler)
    count = Count()
    accelerator.register_for_checkpointing(count)
    accelerator.init_trackers("moved", config={"lr": 0.05})
    numbers = {"loss": [], "norm": [], "lr": [], "accuracy": [], "order": []}

    def epoch(loader, save_after=None):
        model.train()
        for index, (inputs, labels) in enumerate(loader, 1):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    numbers["norm"].append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                    count.updates += 1
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            numbers["loss"].append(loss.item())
            numbers["lr"].append(scheduler.get_last_lr()[0])
            numbers["order"].append(round(float(inputs[0, 0]), 6))
            if index == save_after:
                accelerator.save_state()
                numbers["saved"] = values(accelerator.unwrap_model(model).state_dict())

    def accuracy():
        model.eval()
        hits = []
        for inputs, labels in test:
            with torch.no_grad():
                found = model(inputs).argmax(-1)
            found, labels = accelerator.gather_for_metrics((found, labels))
            hits += (found == labels).tolist()
        return [sum(hits), len(hits)]

    epoch(train)
    numbers["accuracy"].append(accuracy())
    accelerator.log({"loss": numbers["loss"][-1]}, step=count.updates)
    epoch(train, save_after=4)
    numbers["accuracy"].append(accuracy())
    accelerator.load_state(f"{folder}/checkpoints/checkpoint_0")
    numbers["updates"] = count.updates
    numbers["loaded"] = values(accelerator.get_state_dict(model))
    epoch(accelerator.skip_first_batches(train, 4))
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(list(range(3))) as mine:
        numbers["split"] = gather_object(mine)
    numbers["sum"] = float(accelerator.reduce(torch.ones(3), reduction="sum").sum())
    numbers["sent"] = float(send_to_device({"a": [torch.ones(2)]}, accelerator.device)["a"][0].sum())
    numbers["state"] = [PartialState().num_processes, accelerator.is_main_process, accelerator.distributed_type.value]
    logger.info("done", main_process_only=True)
    accelerator.end_training()
    numbers["history"] = history.lines
    print(json.dumps(numbers))


if __name__ == "__main__":
    main(sys.argv[1])
