"""Objects moved between boxes: where is each now?

After Kim and Schuster, "Entity tracking in language models" (arXiv 2305.02363), whose stories in English move objects
between seven boxes. Here with tokens, of this project's statements.

    tokens     0 … boxes - 1        boxes
               then the objects; object i starts in box i mod boxes
               then the operations, each followed by two words:

               put o b      object o goes to box b
               pour a b     all that is in box a goes to box b
               swap a b     boxes a and b change contents
               where o b    b is the box of object o: to be predicted
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, permutations
from operator import itemgetter
from typing import ClassVar

from m2rnn.tasks.problems.generate import check_at_least
from m2rnn.tasks.problems.machine import Machine, Rule, Statement, Tables, all_states, check_size, table

PUT, POUR, SWAP, WHERE = range(4)  # beyond the objects


@dataclass(frozen=True)
class Boxes(Machine):
    """Predict the box of every object that is asked for."""

    objects: int = 4
    boxes: int = 5

    name: ClassVar[str] = "boxes"
    source: ClassVar[str] = "after Kim and Schuster, arXiv 2305.02363; tokens instead of English"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, objects=self.objects, boxes=self.boxes)
        statements = self.boxes * (self.objects + 2 * self.boxes)
        check_size(self.boxes**self.objects, statements, f"objects {self.objects}, boxes {self.boxes}")

    @property
    def vocab_size(self) -> int:
        return self.boxes + self.objects + 4

    def build(self) -> Tables:
        first = self.boxes + self.objects

        def moved(places: dict[int, int]) -> Rule:
            """Whatever is in one of these boxes goes to another."""
            return lambda state: tuple(places.get(box, box) for box in state)

        def put(thing: int, box: int) -> Rule:
            return lambda state: (*state[:thing], box, *state[thing + 1 :])

        seen: list[Iterable[Statement]] = [
            [((first + PUT, self.boxes + o, b), put(o, b)) for o in range(self.objects) for b in range(self.boxes)],
            [((first + POUR, a, b), moved({a: b})) for a, b in permutations(range(self.boxes), 2)],
            [((first + SWAP, a, b), moved({a: b, b: a})) for a, b in combinations(range(self.boxes), 2)],
        ]

        questions = [((first + WHERE, self.boxes + o), itemgetter(o)) for o in range(self.objects)]
        start = tuple(o % self.boxes for o in range(self.objects))
        return table(all_states(self.boxes, self.objects), start, seen, questions)
