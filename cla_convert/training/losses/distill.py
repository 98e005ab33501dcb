"""Distillation: forward KL from a frozen teacher (Hinton et al. 2015, arXiv 1503.02531)."""

from collections.abc import Sequence

from ..train_loss import LOSSES, LossSettings, Term, TrainLoss


class Distill(TrainLoss):
    """KL(teacher || model), and some cross-entropy if that is asked for."""

    name, needs_teacher = "distill", True
    summary = "forward KL from a frozen teacher."

    def terms(self, settings: LossSettings) -> Sequence[tuple[Term, float]]:
        """KL and cross-entropy."""
        from ..loss import CROSS_ENTROPY, KL

        return (KL, 1.0), (CROSS_ENTROPY, settings.cross_entropy_weight)


LOSSES.register(Distill())
