"""What runs a plan: the part of a model that one process holds, and what it exchanges with the others."""
