"""Synthetic problems with exact answers, and how models are trained and tested on them."""

from m2rnn.tasks.problems import Batch, Group, Score, Split, WordProblem

__all__ = ["Batch", "Group", "Score", "Split", "WordProblem"]
