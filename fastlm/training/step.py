"""Step: one step of training, and the precision of its products.

    g = sum_i count_i / batch_size · d loss_i / d p                         over the micro-batches i
    p = AdamW(p, g · min(1, grad_clip / |g|))                               where |g| and the loss are finite
"""

import contextlib
import math

import torch

from fastlm.measure.numerics import DTYPES
from fastlm.training.batches import Batches
from fastlm.training.optimizer import learning_rate


class Step:
    """Takes steps: micro-batches forward and backward, the gradient clipped, the update of model and optimizer.

    It keeps nothing from one step to the next and knows no files, reports or evaluation, so that another with the same
    call, such as a captured one, can stand in its place: that one must keep on the device what are numbers of the host
    here, the learning rate and AdamW's step (adamw_ takes both as rates), and copy batch and seed in. loader:
    data.loader's, for the sequences of each step.
    """

    def __init__(self, model, optimizer, loader, config):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.batches = Batches(loader, config, next(model.parameters()).device)
        self._loss = torch.compile(model.loss) if config.compile else model.loss

    def __call__(self, number):
        """Takes step `number` of the run; (loss, gradient norm, taken), two floats and a bool.

        A step without a finite loss and gradient is not taken: neither weights nor moments change.
        """
        self.model.train()
        loss = self._backward(number)
        flat, norm = self.optimizer.gradients()
        self.optimizer.step(flat, norm, learning_rate(number, self.config), loss)
        self.optimizer.zero_grad()
        norm, loss = float(norm), float(loss)  # a GPU has all of the step to do by now
        if finite := math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.count()
        return loss, norm, finite

    def _backward(self, number):
        """The mean loss () of the step's sequences, as a tensor; its gradient is left in the parameters."""
        config, total = self.config, 0.0
        for first in range(0, config.batch_size, self.batches.micro):
            tokens, targets, seed = self.batches(number, first)  # (count, T) each
            count = len(tokens)
            scale = count / config.batch_size if count < config.batch_size else None  # all have as many targets
            with autocast(config.dtype, self.batches.device.type):
                loss = self._loss(tokens, targets, seed=seed if config.dropout else None, scale=scale)
            loss.backward()
            total = total + loss.detach()
        return total


def autocast(dtype, device_type):
    """The context of a step whose products are in dtype, "fp32", "bf16" or "fp16".

    A CPU without bf16 products, on which PyTorch's take a hundred times as long as those in fp32, makes them in fp32.
    """
    if dtype == "fp32" or lacks(dtype, device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=DTYPES[dtype])


def lacks(dtype, device_type):
    """Whether this machine has no products in dtype on devices of that type, so that `autocast` makes them in fp32."""
    return (dtype, device_type) == ("bf16", "cpu") and not _multiplies_bf16()


def _multiplies_bf16():
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
