"""Listener: what is told of a run; a report, the metrics, a sample are listeners, and the loop knows none of them."""


class Listener:
    """Is told what a run does, and does nothing; a listener overrides the events that it wants.

    Listeners are told in the order in which they were given. What one raises ends the run.
    """

    def say(self, text):
        """A sentence for the user."""

    def preparing(self, done, total):
        """Characters tokenised so far."""

    def prepared(self, manifest):
        """The data was prepared."""

    def resumed(self, trainer, path):
        """The run's state is that of the checkpoint `path`."""

    def started(self, trainer):
        """The loop begins."""

    def stepped(self, trainer, loss):
        """A step was taken."""

    def evaluated(self, trainer, row):
        """The run was evaluated; row is a dict for metrics.jsonl (metrics.py)."""

    def finished(self, trainer):
        """The loop ended: at the last step, where trainer.done, or because it was stopped."""


def tell(listeners, event, *what):
    """Tells an event, a method of `Listener` by name, to all of them."""
    for listener in listeners:
        getattr(listener, event)(*what)
