"""Throughput of the generators of synthetic tasks on one core: training batches of 128 sequences of the longest length.

Run ``python benchmarks/task_generators.py`` for all of m2rnn tasks list, with names (``mqar traces``) for some.
"""

import sys
import time

from m2rnn.tasks.problems import PROBLEMS, make_problem

BATCH_SIZE = 128
SECONDS = 1.0


def tokens_per_second(name: str) -> float:
    problem = make_problem(name)
    length = problem.train_lengths[1]
    problem.batch("train", 0, BATCH_SIZE, length)  # makes the tables of those that have some
    batches, began = 0, time.process_time()
    while time.process_time() - began < SECONDS:
        batches += 1
        problem.batch("train", batches, BATCH_SIZE, length)
    return batches * BATCH_SIZE * length / (time.process_time() - began)


def main() -> None:
    print(f"{'task':<29}{'million tokens a second':>24}")
    for name in sys.argv[1:] or PROBLEMS:
        print(f"{name:<29}{tokens_per_second(name) / 1e6:>24.1f}", flush=True)


if __name__ == "__main__":
    main()
