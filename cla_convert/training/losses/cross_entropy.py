"""Next-token prediction, as in pretraining."""

from collections.abc import Sequence

from ..train_loss import LOSSES, LossSettings, Term, TrainLoss


class CrossEntropy(TrainLoss):
    """Cross-entropy on the data."""

    name, needs_teacher = "cross_entropy", False
    summary = "next-token loss on the data."

    def terms(self, settings: LossSettings) -> Sequence[tuple[Term, float]]:
        """Cross-entropy alone."""
        from ..loss import CROSS_ENTROPY

        return ((CROSS_ENTROPY, 1.0),)


LOSSES.register(CrossEntropy())
