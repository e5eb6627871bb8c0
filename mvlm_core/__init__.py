"""What the two models share: corpus, tokens, batches, training loop, checkpoints, evaluation, export."""
