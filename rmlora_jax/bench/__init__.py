"""What a training step costs on your own device: ``python -m rmlora_jax.bench``."""
