"""fp16 where gradients lie in pieces: one that is not finite, on any process, lets all of them skip the update."""

from __future__ import annotations

import torch
import torch.distributed as dist

from polyaccel_torch.sharded.mesh import local_of, settle


class ShardedGradScaler(torch.amp.GradScaler):
    """torch's GradScaler over this process's pieces, on whatever meshes and devices they are. Every process must make all its calls."""

    # What torch's own ShardedGradScaler of FSDP1 replaces too: the rest of GradScaler asks this method alone about gradients.
    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    piece = local_of(settle(parameter))
                    kinds.setdefault((piece.device, piece.dtype), []).append(piece)
        found = found_inf.to(inv_scale.device, copy=True)
        with torch.no_grad():
            for (device, _), pieces in kinds.items():
                here = torch.zeros_like(found, device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(pieces, here, inv_scale.to(device))
                found = torch.maximum(found, here.to(found.device))
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return {found.device: found}
