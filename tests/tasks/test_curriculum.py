"""Length, end and learning rate of a run follow its loss."""

import pytest

from m2rnn.tasks.curriculum import PEAK_RATE_LENGTH, SOLVED_STEPS, WARMUP_STEPS, Curriculum, Progress


def run(curriculum: Curriculum, loss_at) -> list[Progress]:
    """Every progress of a run whose loss is ``loss_at(progress)``."""
    history = [curriculum.start()]
    while not curriculum.is_finished(history[-1]):
        history.append(curriculum.after(history[-1], loss_at(history[-1])))
    return history


def test_the_length_grows_by_a_quarter_up_to_the_training_length():
    history = run(Curriculum(train_length=32, steps=1000), lambda progress: 0.0)
    lengths = list(dict.fromkeys(progress.length for progress in history))
    assert lengths == [4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 32]


def test_the_length_stays_while_the_loss_is_large():
    curriculum = Curriculum(train_length=128, steps=300)
    history = run(curriculum, lambda progress: 0.02 if progress.length < 8 else 1.0)
    assert history[-1].length == 8
    sooner = Curriculum(train_length=128, steps=300, grow_below=1.5)
    assert run(sooner, lambda progress: 0.02 if progress.length < 8 else 1.0)[-1].length == 128
    assert history[-1].step == 300
    assert history[-1].solved_at is None


@pytest.mark.parametrize(("train_length", "grow", "start"), [(128, True, 4), (3, True, 3), (128, False, 128)])
def test_the_first_length(train_length, grow, start):
    assert Curriculum(train_length, 10, grow).start().length == start


@pytest.mark.parametrize("decay_steps", [100, 300])
def test_a_solved_run_ends_after_its_decay(decay_steps):
    history = run(Curriculum(train_length=8, steps=5000, decay_steps=decay_steps), lambda progress: 0.001)
    full_length_from = next(progress.step for progress in history if progress.length == 8)
    assert history[-1].solved_at == full_length_from + SOLVED_STEPS
    assert history[-1].step == history[-1].solved_at + decay_steps


def test_a_bad_step_starts_the_count_again_and_a_very_bad_one_the_decay():
    def last(bad_step: int, loss: float) -> Progress:
        curriculum = Curriculum(train_length=4, steps=5000)
        return run(curriculum, lambda progress: loss if progress.step == bad_step else 0.001)[-1]

    assert last(bad_step=30, loss=0.5).solved_at > 30 + SOLVED_STEPS
    assert last(bad_step=SOLVED_STEPS + 10, loss=0.5).solved_at == SOLVED_STEPS
    lost = last(bad_step=SOLVED_STEPS + 10, loss=10.0)
    assert lost.solved_at > SOLVED_STEPS + 10 + SOLVED_STEPS
    assert lost.step == lost.solved_at + 100


def test_a_problem_that_is_lost_while_the_learning_rate_falls_is_not_solved():
    curriculum = Curriculum(train_length=4, steps=200)
    history = run(curriculum, lambda progress: 0.001 if progress.step < SOLVED_STEPS + 20 else 1.0)
    assert history[SOLVED_STEPS].solved_at == SOLVED_STEPS
    assert history[-1].solved_at is None
    assert history[-1].step == 200


def test_patience_counts_steps_at_one_length_and_none_at_the_full_one():
    slow = Curriculum(train_length=6, steps=5000, patience=100)
    history = run(slow, lambda progress: 0.2 if progress.step < 50 or progress.length == 5 else 0.0)
    lengthened = [progress.step for progress in history if progress.grown_at == progress.step]
    assert history[-1].length == 5
    assert history[-1].step == lengthened[-1] + 100 > 150
    assert slow.is_given_up(history[-1])
    assert history[-1].solved_at is None
    full = Curriculum(train_length=4, steps=500, patience=100)
    assert run(full, lambda progress: 1.0)[-1].step == 500


def test_inputs_grow_at_six_tokens_and_the_problem_is_solved_with_all_of_them():
    curriculum = Curriculum(train_length=8, steps=5000, inputs=(4, 10))
    history = run(curriculum, lambda progress: 0.1 if progress.length == 6 and progress.inputs < 10 else 0.0)
    stages = list(dict.fromkeys((progress.length, progress.inputs) for progress in history))
    assert stages == [(4, 4), (5, 4), (6, 4), (6, 5), (6, 6), (6, 7), (6, 9), (6, 10), (7, 10), (8, 10)]
    assert history[-1].solved_at is not None
    hard = run(Curriculum(train_length=5, steps=300, inputs=(4, 10)), lambda progress: 4.0 * (progress.inputs > 4))
    assert (hard[-1].step, hard[-1].length, hard[-1].solved_at) == (300, 5, None)
    assert 4 < hard[-1].inputs < 10


@pytest.mark.parametrize("steps", [1, 7, 99, 100, 101, 5000])
@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_learning_rate_rises_stays_and_falls(steps, loss):
    curriculum = Curriculum(train_length=16, steps=steps)
    history = run(curriculum, lambda progress: loss)
    assert history[-1].step <= steps
    rates = [curriculum.learning_rate(progress) for progress in history[:-1]]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(min(1 / min(steps, curriculum.decay_steps), len(rates) / WARMUP_STEPS))


def test_the_learning_rate_falls_with_the_root_of_the_length_that_sequences_grow_to():
    curriculum = Curriculum(train_length=64, steps=1000)
    history = run(curriculum, lambda progress: 0.02)
    rates = {progress.length: curriculum.learning_rate(progress) for progress in history[WARMUP_STEPS:-200]}
    assert max(rates) == 64
    assert rates[64] == 0.5
    assert all(rate == min(1, (PEAK_RATE_LENGTH / length) ** 0.5) for length, rate in rates.items())
    at_the_end = [curriculum.learning_rate(progress) for progress in history[-4:-1]]
    assert at_the_end == pytest.approx([0.5 * left / 100 for left in (3, 2, 1)])  # of 100 steps from there to zero
    at_once = Curriculum(train_length=64, steps=1000, grow=False)
    assert at_once.learning_rate(at_once.after(history[WARMUP_STEPS], 0.02)) == 1
