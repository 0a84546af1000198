"""Training and evaluation: one pure step and one loop each."""
