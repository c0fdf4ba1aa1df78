"""Ways to choose quantised values."""
