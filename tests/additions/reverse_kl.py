"""A loss: KL(model || teacher), whose gradient autograd finds."""

from collections.abc import Sequence

from torch import Tensor

from cla_convert.training.train_loss import LOSSES, ByAutograd, Chunk, LossSettings, Term, TrainLoss


def reverse_kl(chunk: Chunk) -> Tensor:
    assert chunk.teacher is not None
    log_p, log_q = ((logits / chunk.temperature).log_softmax(-1) for logits in (chunk.logits, chunk.teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class ReverseKL(TrainLoss):
    name, summary, needs_teacher = "reverse_kl", "reverse KL from a frozen teacher.", True

    def terms(self, settings: LossSettings) -> Sequence[tuple[Term, float]]:
        return ((ByAutograd("reverse_kl", reverse_kl), 1.0),)


LOSSES.register(ReverseKL())
