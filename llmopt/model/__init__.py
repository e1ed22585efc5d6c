"""Models: what they are (`spec`), which families are known (`families`), and their tensors (`checkpoint`)."""
