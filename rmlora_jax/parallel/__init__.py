"""How a step runs on every device."""
