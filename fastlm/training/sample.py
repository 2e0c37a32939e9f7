"""What a model that was trained writes."""

import torch

from fastlm.training.listener import Listener


class Sample(Listener):
    """Says a text of the model's when the run is at its end, if sample_tokens wants one."""

    def finished(self, trainer):
        if trainer.done and trainer.config.sample_tokens:
            trainer.tell("say", f"\na sample:\n\n{sample(trainer)}\n")


def sample(trainer):
    """A text that the trained model writes, after the configured prompt, or the first held-out words (where
    nothing is held out, the first of the training text).

    Where the text outgrows the model's context, it goes on from the last half of it. Raises ValueError where the
    prompt fills the context.
    """
    config, tokenizer, model = trainer.config, trainer.tokenizer, trainer.state.model
    if config.sample_prompt is None:
        tokens, _ = next(iter((trainer.val_data or trainer.train_data).whole(1)))
        text = tokens[0, : max(1, min(8, tokens.shape[1] // 4))]
    else:
        text = torch.tensor(tokenizer.encode(config.sample_prompt))
    context, wanted = model.config.n_positions, len(text) + config.sample_tokens
    if len(text) >= context:
        raise ValueError(f"sample_prompt has {len(text)} tokens, wanted fewer than the context of {context}")
    while len(text) < wanted:
        given = text if len(text) < context else text[-(context // 2 or 1) :]
        count = min(context - len(given), wanted - len(text))
        if count < 1:
            break
        row = model.generate(
            [given], max_new_tokens=count, temperature=0.8, top_k=200, seed=config.seed + len(text), stop_at=None,
            vocab_size=tokenizer.vocab_size,  # the checkpoint that it began with may have more
        )[0]
        text = torch.cat([text, row[len(given) :]])
    return tokenizer.decode(text)
