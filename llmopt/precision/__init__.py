"""Precision: which scheme each part of a model gets, so that the least is lost within a budget."""
