"""Synthetic problems with exact answers: a generator and a scorer each, in numpy, which know no model."""

from m2rnn.tasks.problems.word_problem import Batch, Group, Score, Split, WordProblem

__all__ = ["Batch", "Group", "Score", "Split", "WordProblem"]
