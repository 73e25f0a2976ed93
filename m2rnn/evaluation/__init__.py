"""Evaluation: what a trained model can do, as numbers, tables and plots."""
