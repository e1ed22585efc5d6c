"""Engines: open a model or an artifact the way its user would, and give logits, prefill and decode."""
