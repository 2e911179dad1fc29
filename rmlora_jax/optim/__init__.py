"""The parts of RM-LoRA and its baselines as optax transformations, on any tree with factors."""
