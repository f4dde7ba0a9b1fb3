"""transformers records hidden states, attentions and router logits by hooks that a model installs in the first forward that asks for them.

A captured forward is a rehearsal: what it does to the module is taken back. So the hooks are installed before, while nothing runs;
they do nothing until a forward asks.
"""

from __future__ import annotations

import sys

from torch import nn

_INSTALLED = "_output_capturing_hooks_installed"


def install_output_recorders(module: nn.Module) -> None:
    """Do for every model of transformers in `module` what its first recording forward would do; nothing where that has happened."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    modeling = sys.modules.get("transformers.modeling_utils")
    if recording is None or modeling is None:
        return
    for model in module.modules():  # outermost first: one call serves the models inside
        records = isinstance(model, modeling.PreTrainedModel) and model._can_record_outputs
        if records and not any(getattr(part, _INSTALLED, False) for part in model.modules()):
            recording.maybe_install_capturing_hooks(model)
