"""Model 2's training loss: accuracy, content alignment and coherence, each a proper score of real text.

Every part is a cross-entropy of tokens of the corpus, so none can fall without the model predicting text better: no
constant output, saturated gate or repeated text satisfies any of them.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from mvlm_core.training.cross_entropy import linear_cross_entropy
from mvlm_core.training.state import StepLoss
from simone_transformer.rope_attention import Pointing


class ComprehensiveTrainingLoss(nn.Module):
    """The weighted sum of three parts.

    - **accuracy**: next-token cross-entropy.
    - **content alignment**: the same, each token weighted by its document's ``quality_score × biblical_alignment``
      scaled to mean 1 over the train text.
    - **coherence**: cross-entropy of the token after the next one, predicted from the same hidden states through an
      adapter that is used in training only. Its weight falls linearly to 0 at ``coherence_until`` of the run,
      because predicting further ahead holds small models back when it stays (Gloeckle et al., arXiv 2404.19737).

    Args:
        hidden_dim: width of the hidden states.
        accuracy_weight, alignment_weight, coherence_weight: non-negative; a part of weight 0 costs nothing.
        loss_kernel: of ``linear_cross_entropy``.
    Raises:
        ValueError: a negative weight, or neither accuracy nor alignment.
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
                "accuracy_weight and alignment_weight must not both be 0: nothing would predict the next token"
            )
        self.accuracy_weight, self.alignment_weight = accuracy_weight, alignment_weight
        self.coherence_weight, self.coherence_until = coherence_weight, coherence_until
        self.loss_kernel = loss_kernel
        self.ahead = nn.Linear(hidden_dim, hidden_dim, bias=False) if coherence_weight > 0 else None
        if self.ahead is not None:
            nn.init.zeros_(self.ahead.weight)

    def coherence_weight_at(self, progress: float) -> float:
        """The coherence part's weight at this share of the run (0 … 1)."""
        if self.ahead is None or progress >= self.coherence_until:
            return 0.0
        return self.coherence_weight * (1 - progress / self.coherence_until)

    def idle_parameters(self, progress: float) -> list[nn.Parameter]:
        """Those without a gradient at this share of the run: the coherence adapter's, once its weight is 0."""
        return [] if self.ahead is None or self.coherence_weight_at(progress) > 0 else list(self.ahead.parameters())

    def forward(
        self,
        hidden: Tensor,
        output_weight: Tensor,
        targets: Tensor,
        document_weights: Tensor,
        progress: float,
        pointing: Pointing | None = None,
    ) -> StepLoss:
        """Score one micro-batch.

        Args:
            hidden: ``[batch, seq, hidden_dim]``, the model's last hidden states.
            output_weight: ``[vocab, hidden_dim]``, the output embedding.
            targets: ``[batch, seq]``, each position's next token.
            document_weights: ``[batch, seq]``, mean 1 over the train text.
            progress: share of the run that is done.
            pointing: where the model's pointer head points, which the first two parts score as well.
        """
        token_weights = None
        if self.alignment_weight > 0 or self.accuracy_weight != 1:
            token_weights = self.accuracy_weight + self.alignment_weight * document_weights
        score = partial(linear_cross_entropy, kernel=self.loss_kernel)
        mixture = None if pointing is None else (pointing.vocabulary, pointing.at(targets))
        total, nll = score(hidden, output_weight, targets, token_weights, mixture=mixture)
        parts = {"accuracy_loss": nll.mean(), "alignment_loss": (nll * document_weights).mean()}
        weight = self.coherence_weight_at(progress)
        if self.ahead is not None and weight > 0:
            early = hidden[:, :-1]
            ahead, _ = score(early + self.ahead(early), output_weight, targets[:, 1:])
            total = total + weight * ahead
            parts["coherence_loss"] = ahead.detach()
        return StepLoss(total, parts["accuracy_loss"], parts)
