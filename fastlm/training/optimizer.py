"""AdamW as GPT-2 is trained with it, and the learning rate over a run."""

import math

import torch

from fastlm.ops import adamw_, grad_norm


def learning_rate(step, config):
    """The rate of a step: linear warm-up, then half a cosine down to min_learning_rate at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    span = config.steps - config.warmup_steps
    part = min((step - config.warmup_steps) / span, 1.0) if span > 0 else 1.0
    low, high = config.min_learning_rate, config.learning_rate
    return low + 0.5 * (1.0 + math.cos(math.pi * part)) * (high - low)


LARGE = 2**20  # elements from which a parameter has a buffer of its own


class AdamW:
    """AdamW as GPT-2 is trained with it: matrices and embeddings decay, biases and norms (1-D) do not.

    Parameters that decay alike lie in one flat buffer, large ones each in its own, and so do their moments: `step`
    makes a sweep over each buffer.
    """

    def __init__(self, model, config):
        self.config, self.steps = config, 0
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        kinds = {}
        for parameter in self.names:
            decay = config.weight_decay if parameter.dim() >= 2 else 0.0
            kinds.setdefault((decay, parameter if parameter.numel() >= LARGE else None), []).append(parameter)
        self.parts = [_Part(parameters, decay) for (decay, _), parameters in kinds.items()]

    @torch.no_grad()
    def gradients(self):
        """The flat gradient of every buffer, and their norm () as a tensor."""
        flat = [part.gradient() for part in self.parts]
        norms = [grad_norm(g) for g in flat]
        return flat, norms[0] if len(norms) == 1 else grad_norm(torch.stack(norms))

    def step(self, flat, norm, learning_rate, loss=None):
        """A step with what `gradients` returned, clipped to the norm grad_clip.

        Where the norm or the loss, tensors (), are not finite it changes nothing: the device sees to that, and the host
        need not wait for it. Who knows that the step was taken says so with `count`.
        """
        config = self.config
        finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        scale = torch.where(finite, torch.clamp(config.grad_clip / (norm + 1e-6), max=1.0), math.nan)
        for part, g in zip(self.parts, flat):
            adamw_(part.p, g, part.exp_avg, part.exp_avg_sq, step=self.steps + 1, learning_rate=learning_rate,
                   beta1=config.beta1, beta2=config.beta2, epsilon=config.epsilon, weight_decay=part.decay, scale=scale)

    def count(self):
        """The last step was taken."""
        self.steps += 1

    def zero_grad(self):
        for parameter in self.names:
            parameter.grad = None

    def state(self):
        """{name: tensor} of the moments by parameter, as `load` takes it, and of the steps that were taken."""
        found = {"step": torch.tensor(self.steps)}
        for part in self.parts:
            for key in ("exp_avg", "exp_avg_sq"):
                views = part.split(getattr(part, key))
                found |= {f"{key}.{self.names[parameter]}": view for parameter, view in zip(part.parameters, views)}
        return found

    def load(self, state):
        """Takes over what `state` returned; moments that are missing are those of a parameter never stepped."""
        steps = [int(value) for key, value in state.items() if key.split(".")[0] == "step"]
        self.steps = max(steps, default=0)
        for key, value in self.state().items():
            if key in state and key != "step":
                value.copy_(state[key])


class _Part:
    """Parameters in one flat buffer p, with moments alike."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        if len(parameters) == 1 and parameters[0].is_contiguous():
            self.p = parameters[0].detach().view(-1)
        else:
            self.p = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            for parameter, view in zip(parameters, self.split(self.p)):
                parameter.data = view
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.p), torch.zeros_like(self.p)

    def split(self, flat):
        """The views of a flat buffer that have the parameters' shapes."""
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters)]

    def gradient(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return grads[0].reshape(-1) if len(grads) == 1 else torch.cat([grad.reshape(-1) for grad in grads])
