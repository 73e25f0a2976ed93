"""Traces of small programs: assignments, swaps, arithmetic and conditionals, and a value printed now and then.

After Siems et al., "Learning State-Tracking from Code Using Linear RNNs" (arXiv 2602.14814), who turn permutations into
traces of a Python session with sparse reveals of the state, predicted as next tokens, and study actions that are not
fully observed. They find that linear recurrences then fall behind non-linear ones. The statements here are this
project's, and go beyond permutations; so figures are not comparable.

    tokens     0 … modulus - 1          numbers
               then the variables       a, b, …, which start at 1, 2, …
               then the operations, each followed by two words:

               set a v      a = v                   add a b    a = a + b
               copy a b     a = b                   sub a b    a = a - b
               swap a b     a, b = b, a             mul a b    a = a · b
               if a b       if a != 0: b = b + 1    print a v  v is the value of a: to be predicted
               maybe swap a b, maybe add a v        happens or not; nobody tells

All arithmetic is modulo ``modulus``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations
from operator import itemgetter
from typing import ClassVar

from m2rnn.tasks.problems.generate import check_at_least, check_probability
from m2rnn.tasks.problems.machine import Machine, Rule, State, Statement, Tables, all_states, check_size, table

OPERATIONS = ("set", "copy", "swap", "add", "sub", "mul", "if", "print", "maybe swap", "maybe add")


@dataclass(frozen=True)
class Traces(Machine):
    """Predict every printed value of programs over a few variables.

    ``hidden`` is the probability that a statement is one of those that happen or not. With it only those printed values
    count that follow from what has been seen.
    """

    variables: int = 3
    modulus: int = 5
    hidden: float = 0.0

    source: ClassVar[str] = "after Siems et al., arXiv 2602.14814, with this project's statements"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, variables=self.variables)
        check_at_least(2, modulus=self.modulus)
        check_probability(hidden=self.hidden)
        options = f"variables {self.variables}, modulus {self.modulus}"
        check_size(self.modulus**self.variables, self.variables * (2 * self.modulus + 7 * self.variables), options)

    @property
    def name(self) -> str:
        return "traces_hidden" if self.hidden else "traces"

    @property
    def vocab_size(self) -> int:
        return self.modulus + self.variables + len(OPERATIONS)

    @property
    def hides(self) -> float:
        return self.hidden

    def build(self) -> Tables:
        numbers, variables = range(self.modulus), range(self.variables)
        first_operation = self.modulus + self.variables
        code = {operation: first_operation + i for i, operation in enumerate(OPERATIONS)}

        def fixed(rule: Callable[[State, int, int], State], a: int, b: int) -> Rule:
            return lambda state: rule(state, a, b)

        def of_number(name: str, rule: Callable[[State, int, int], State]) -> Iterable[Statement]:
            """One statement for each variable a and number v."""
            for a in variables:
                for v in numbers:
                    yield (code[name], self.modulus + a, v), fixed(rule, a, v)

        def of_pair(name: str, rule: Callable[[State, int, int], State]) -> Iterable[Statement]:
            """One statement for every two different variables a and b."""
            for a, b in permutations(variables, 2):
                yield (code[name], self.modulus + a, self.modulus + b), fixed(rule, a, b)

        def put(state: State, place: int, value: int) -> State:
            return (*state[:place], value % self.modulus, *state[place + 1 :])

        def swap(s: State, a: int, b: int) -> State:
            return put(put(s, a, s[b]), b, s[a])

        seen = [
            of_number("set", put),
            of_pair("copy", lambda s, a, b: put(s, a, s[b])),
            of_pair("swap", swap),
            of_pair("add", lambda s, a, b: put(s, a, s[a] + s[b])),
            of_pair("sub", lambda s, a, b: put(s, a, s[a] - s[b])),
            of_pair("mul", lambda s, a, b: put(s, a, s[a] * s[b])),
            of_pair("if", lambda s, a, b: put(s, b, s[b] + (s[a] != 0))),
        ]
        hidden = [of_pair("maybe swap", swap), of_number("maybe add", lambda s, a, v: put(s, a, s[a] + v))]
        questions = [((code["print"], self.modulus + a), itemgetter(a)) for a in variables]
        states = all_states(self.modulus, self.variables)
        start = tuple((a + 1) % self.modulus for a in variables)
        return table(states, start, seen, questions, hidden if self.hidden else ())
