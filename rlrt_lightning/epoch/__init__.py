"""One epoch, from prompts to micro-batches."""
