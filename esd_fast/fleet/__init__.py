"""Many erasures of one model, each by itself, over the workers of a Ray cluster."""
