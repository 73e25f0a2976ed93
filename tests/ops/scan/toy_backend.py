"""A backend in a dozen lines: the reference, with saved states that it does not need."""

from m2rnn.ops.scan import reference


def why_not(problem):
    return None if problem.value_dim < 100 else f"V is {problem.value_dim}, and the toy takes up to 99"


def saved_like(problem):
    return problem.new_states(problem.sequences + 3, problem.output_dtype)  # a layout that is nobody else's


def forward(problem, save):
    y, final, _ = reference.forward(problem, save)
    return y, final, saved_like(problem).fill_(7) if save else None


def backward(problem, saved, dy, d_final):
    assert saved.shape == saved_like(problem).shape
    assert (saved == 7).all()
    return reference.backward(problem, saved, dy, d_final)
