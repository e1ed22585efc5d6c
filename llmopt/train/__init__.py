"""Training: one loop for whatever learns, in mixed precision, on one process or several."""
