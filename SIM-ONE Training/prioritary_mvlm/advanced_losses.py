"""Training loss of model 2: accuracy, content alignment and coherence.

Each part is a cross-entropy on corpus tokens, so it can only fall if the model predicts the text better: a constant
output, a saturated gate or repeated text does not lower it.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from mvlm_core.training.cross_entropy import linear_cross_entropy
from mvlm_core.training.distillation import DISTILLATION_WEIGHT
from mvlm_core.training.distillation_loss import Prediction, distillation_loss
from mvlm_core.training.recipe import StepLoss
from simone_transformer.rope_attention import PointerOutput


class ComprehensiveTrainingLoss(nn.Module):
    """Weighted sum of three loss terms.

    - **accuracy**: next-token cross-entropy.
    - **content alignment**: next-token cross-entropy with each token weighted by its document's
      ``quality_score × biblical_alignment``, normalized to mean 1 over the train text.
    - **coherence**: cross-entropy of the token after the next one, predicted from the same hidden states through a
      training-only adapter. Its weight decays linearly to 0 at the fraction ``coherence_until`` of the run, because
      multi-token prediction hurts small models if kept throughout (Gloeckle et al., arXiv 2404.19737).

    Args:
        hidden_dim: width of the hidden states.
        accuracy_weight, alignment_weight, coherence_weight: non-negative; a term with weight 0 costs nothing.
        loss_kernel: the ``kernel`` of ``linear_cross_entropy``.
    Raises:
        ValueError: a weight is negative, or accuracy and alignment are both 0.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        accuracy_weight: float = 1.0,
        alignment_weight: float = 0.0,
        coherence_weight: float = 0.0,
        coherence_until: float = 0.5,
        loss_kernel: str = "blocks",
    ) -> None:
        super().__init__()
        if min(accuracy_weight, alignment_weight, coherence_weight) < 0:
            raise ValueError("loss weights must not be negative")
        if accuracy_weight + alignment_weight == 0:
            raise ValueError(
                "accuracy_weight and alignment_weight must not both be 0: the model would have no next-token loss"
            )
        self.accuracy_weight, self.alignment_weight = accuracy_weight, alignment_weight
        self.coherence_weight, self.coherence_until = coherence_weight, coherence_until
        self.loss_kernel = loss_kernel
        self.ahead = nn.Linear(hidden_dim, hidden_dim, bias=False) if coherence_weight > 0 else None
        if self.ahead is not None:
            nn.init.zeros_(self.ahead.weight)

    def coherence_weight_at(self, progress: float) -> float:
        """Weight of the coherence term at this fraction of the run (0 … 1)."""
        if self.ahead is None or progress >= self.coherence_until:
            return 0.0
        return self.coherence_weight * (1 - progress / self.coherence_until)

    def forward(
        self,
        hidden: Tensor,
        output_weight: Tensor,
        targets: Tensor,
        document_weights: Tensor,
        progress: float,
        pointer_output: PointerOutput | None = None,
        teacher: Prediction | None = None,
    ) -> StepLoss:
        """Compute the loss of one micro-batch.

        Args:
            hidden: ``[batch, seq, hidden_dim]``, the last hidden states.
            output_weight: ``[vocab, hidden_dim]``, the output embedding.
            targets: ``[batch, seq]``, next-token ids.
            document_weights: ``[batch, seq]``, mean 1 over the train text.
            progress: fraction of the run completed.
            pointer_output: the pointer head's output, mixed into the prediction for the first two terms.
            teacher: a teacher's prediction; distillation gets ``DISTILLATION_WEIGHT`` of the loss, the three terms the
                rest.
        """
        token_weights = None
        if self.alignment_weight > 0 or self.accuracy_weight != 1:
            token_weights = self.accuracy_weight + self.alignment_weight * document_weights
        cross_entropy = partial(linear_cross_entropy, kernel=self.loss_kernel)
        weight = self.coherence_weight_at(progress)
        parts: dict[str, Tensor] = {}
        if teacher is None:
            mixture = pointer_output and (pointer_output.log_vocab_prob, pointer_output.log_prob(targets))
            total, nll = cross_entropy(hidden, output_weight, targets, token_weights, mixture=mixture)
        else:
            weight *= 1 - DISTILLATION_WEIGHT
            student = Prediction(hidden, output_weight, pointer_output)
            total, nll, parts["distillation_loss"] = distillation_loss(
                student, teacher, targets, DISTILLATION_WEIGHT, token_weights, self.loss_kernel
            )
        parts |= {"accuracy_loss": nll.mean(), "alignment_loss": (nll * document_weights).mean()}
        if self.ahead is not None and weight > 0:
            early = hidden[:, :-1]
            coherence, _ = cross_entropy(early + self.ahead(early), output_weight, targets[:, 1:])
            total = total + weight * coherence
            parts["coherence_loss"] = coherence.detach()
        return StepLoss(total, parts["accuracy_loss"], parts)
