"""Statistics of batch norms for the weights as they are now."""

from itertools import islice

import torch
from torch import nn

from rbe.train.task import Task, device_of

# Batches of training examples that they are taken from.
BATCHES = 40


@torch.no_grad()
def measure_norms(model: nn.Module, task: Task, epoch: int) -> None:
    """Take them anew; the model is left in training mode where it has any.

    Running means lag some steps behind, in which many signs turn: with them validation measures a network that never
    was.

    Args:
        epoch: what its batches are drawn by.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats]
    if not norms:
        return
    momenta, device = [m.momentum for m in norms], device_of(model)
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain mean over what follows
    model.train()
    generator = torch.Generator().manual_seed(epoch)
    # Full ones, as all count alike.
    full = max(1, task.examples // task.config.train.batch)
    for batch in islice(task.batches(generator), min(BATCHES, full)):
        model(*batch.to(device).inputs)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
