"""Two noisy copies whose masks are drawn independently: what complementary masks are compared with."""

from __future__ import annotations

from dlm_lightning.likelihood import redrawn
from dlm_lightning.noise import Masked
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.view import Batch, Pattern

STREAM = 20  # of the second copy's noise


class IndependentViews(ComplementaryMask):
    """As `ComplementaryMask`, but the second copy's mask does not depend on the first one's.

    Args:
        **options: see `ComplementaryMask`.
    """

    def corrupt(self, batch: Batch, pattern: Pattern) -> list[Masked]:
        again, _ = redrawn(batch, self.trainer.datamodule.seed, STREAM, 0)
        return [self.draw(self.noise, batch, pattern), self.draw(self.noise, again, pattern)]
