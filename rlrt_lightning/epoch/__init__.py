"""One epoch of rollouts, from prompts to micro-batches."""
