"""The answers to every problem once more: one token at a time in plain Python, from the inputs alone.

A solver takes the inputs of one sequence and the problem, and returns the targets. It also asserts what makes the
sequence one of the problem's.
"""

from collections.abc import Callable
from typing import Any

from m2rnn.tasks.problems import IGNORED

Solver = Callable[[list[int], Any], list[int]]
_ = IGNORED


def last_only(answers: list[int], problem: Any) -> list[int]:
    return [_] * (len(answers) - 1) + answers[-1:] if problem.answers == "last" else answers


def parity(bits, problem):
    return last_only([bits[: t + 1].count(1) % 2 for t in range(len(bits))], problem)


def even_pairs(bits, problem):
    answers = []
    for t in range(len(bits)):
        text = "".join(map(str, bits[: t + 1]))
        pairs = sum(text[i : i + 2] in ("01", "10") for i in range(t))
        answers.append(pairs % 2)
    return last_only(answers, problem)


def cycle_navigation(steps, problem):
    place, answers = 0, []
    for step in steps:
        place = (place + {0: problem.places - 1, 1: 0, 2: 1}[step]) % problem.places
        answers.append(place)
    return last_only(answers, problem)


def expression(tokens: list[int], modulus: int) -> str:
    return "".join(str(token) if token < modulus else "+-*()"[token - modulus] for token in tokens)


def modular_arithmetic(tokens, problem):
    first = 0
    if len(tokens) % 2 == 0:
        first = 1
        assert tokens[0] == problem.modulus + 3
    answers = [_] * len(tokens)
    for t in range(first, len(tokens), 2):
        answers[t] = eval(expression(tokens[first : t + 1], problem.modulus)) % problem.modulus
    return last_only(answers, problem)


def modular_arithmetic_brackets(tokens, problem):
    text = expression(tokens, problem.modulus)
    assert "*" not in text or problem.products
    assert is_bracketed(text)
    return [_] * (len(tokens) - 1) + [eval(text) % problem.modulus]


def is_bracketed(text: str) -> bool:
    """Whether ``text`` is d, -d, (d), (-d), or (left operator right) with both parts of the same form."""
    inner = text.removeprefix("(").removesuffix(")")
    if len(text) < 5:
        return inner.removeprefix("-").isdigit() and len(text) - len(inner) in (0, 2)
    depth, inner = 0, text[1:-1]
    for i, character in enumerate(inner):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and i and character in "+-*":
            return text[0] + text[-1] == "()" and is_bracketed(inner[:i]) and is_bracketed(inner[i + 1 :])
    return False


def flip_flop(tokens, problem):
    assert tokens[0] == 2
    assert tokens[(len(tokens) - 1) // 2 * 2] == 3
    memory, targets = None, [_] * len(tokens)
    for t in range(0, len(tokens), 2):
        instruction, bit = tokens[t], tokens[t + 1] if t + 1 < len(tokens) else None
        assert instruction in (2, 3, 4)
        assert bit in (0, 1, None)
        if instruction == 2:
            memory = bit
        elif instruction == 3:
            targets[t] = memory
            assert bit in (memory, None)
    return targets


def dyck(tokens, problem):
    stack, closing, depths = [], [], []
    for token in tokens:
        if token < problem.kinds:
            stack.append(token)
        else:
            assert stack.pop() == token - problem.kinds
        assert len(stack) <= problem.depth
        closing.append(problem.kinds + stack[-1] if stack else 2 * problem.kinds)
        depths.append(len(stack))
    return closing if problem.answer == "close" else depths


def keyed_automata(tokens, problem):
    state, targets = {}, [_] * len(tokens)
    for t in range(1, len(tokens), 2):
        key, letter = tokens[t - 1], tokens[t]
        assert key >= max(problem.states, problem.letters)
        state[key] = targets[t] = int(problem.transitions[state.get(key, 0), letter])
    return targets


SOLVERS: dict[str, Solver] = {
    "parity": parity,
    "even_pairs": even_pairs,
    "cycle_navigation": cycle_navigation,
    "modular_arithmetic": modular_arithmetic,
    "modular_arithmetic_brackets": modular_arithmetic_brackets,
    "flip_flop": flip_flop,
    "dyck": dyck,
    "dyck_depth": dyck,
    "keyed_automata": keyed_automata,
}
