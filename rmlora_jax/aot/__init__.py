"""What a step needs, before any device is paid for."""
