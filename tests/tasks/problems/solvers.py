"""The answers to every problem once more: one token at a time in plain Python, from the inputs alone.

A solver takes the inputs of one sequence, the problem, and which positions are scored, and returns the targets. It also
asserts what makes the sequence one of the problem's. Only the solvers of problems whose questions cannot be told from
what stands around them look at which positions are scored.
"""

from collections.abc import Callable
from typing import Any

from m2rnn.tasks.problems import IGNORED

Solver = Callable[[list[int], Any, list[bool]], list[int]]
_ = IGNORED


def last_only(answers: list[int], problem: Any) -> list[int]:
    return [_] * (len(answers) - 1) + answers[-1:] if problem.answers == "last" else answers


def parity(bits, problem, scored):
    return last_only([bits[: t + 1].count(1) % 2 for t in range(len(bits))], problem)


def even_pairs(bits, problem, scored):
    answers = []
    for t in range(len(bits)):
        text = "".join(map(str, bits[: t + 1]))
        pairs = sum(text[i : i + 2] in ("01", "10") for i in range(t))
        answers.append(pairs % 2)
    return last_only(answers, problem)


def cycle_navigation(steps, problem, scored):
    place, answers = 0, []
    for step in steps:
        place = (place + {0: problem.places - 1, 1: 0, 2: 1}[step]) % problem.places
        answers.append(place)
    return last_only(answers, problem)


def expression(tokens: list[int], modulus: int) -> str:
    return "".join(str(token) if token < modulus else "+-*()"[token - modulus] for token in tokens)


def modular_arithmetic(tokens, problem, scored):
    first = 0
    if len(tokens) % 2 == 0:
        first = 1
        assert tokens[0] == problem.modulus + 3
    answers = [_] * len(tokens)
    for t in range(first, len(tokens), 2):
        answers[t] = eval(expression(tokens[first : t + 1], problem.modulus)) % problem.modulus
    return last_only(answers, problem)


def modular_arithmetic_brackets(tokens, problem, scored):
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


def flip_flop(tokens, problem, scored):
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


def dyck(tokens, problem, scored):
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


def keyed_automata(tokens, problem, scored):
    state, targets = {}, [_] * len(tokens)
    for t in range(1, len(tokens), 2):
        key, letter = tokens[t - 1], tokens[t]
        assert key >= max(problem.states, problem.letters)
        state[key] = targets[t] = int(problem.transitions[state.get(key, 0), letter])
    return targets


def mqar(tokens, problem, scored):
    half = problem.vocabulary // 2
    asked = [t for t in range(len(tokens)) if scored[t]]
    pairs = len(asked)
    assert pairs in problem.pairs_at(len(tokens))
    keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert all(1 <= key < half for key in keys)
    assert all(half <= value < problem.vocabulary for value in values)
    assert sorted(tokens[t] for t in asked) == sorted(keys)
    assert all(t >= 2 * pairs and t % 2 == 0 for t in asked)
    if problem.filler == "zero":
        assert all(tokens[t] == 0 for t in range(2 * pairs, len(tokens)) if not scored[t])
    return [values[keys.index(token)] if scored[t] else _ for t, token in enumerate(tokens)]


def selective_copying(tokens, problem, scored):
    blank, copy = problem.vocabulary - 2, problem.vocabulary - 1
    end = tokens.index(copy)
    symbols = [token for token in tokens[:end] if token != blank]
    assert len(symbols) == min(problem.count, (len(tokens) - 1) // 2)
    assert tokens[end - 1] != blank
    assert tokens[end + 1 :] == [blank] * len(symbols)
    return [_] * (end + 1) + symbols


def copying(tokens, problem, scored):
    end = tokens.index(problem.symbols)
    string = tokens[:end]
    assert end == len(tokens) // 2
    assert tokens[end + 1 :] == string[: len(tokens) - end - 1]
    return ([_] * end + string + [_])[: len(tokens)]


def halves(tokens, empty: int) -> list[int]:
    """The string in front of as many empty places, with one in front of an odd length."""
    count = len(tokens) // 2
    front = len(tokens) - 2 * count
    assert all((token == empty) == (t < front or t >= front + count) for t, token in enumerate(tokens))
    return tokens[front : front + count]


def reversing(tokens, problem, scored):
    string = halves(tokens, problem.symbols)
    return [_] * (len(tokens) - len(string)) + string[::-1]


def bucket_sort(tokens, problem, scored):
    string = halves(tokens, problem.symbols)
    rising = [symbol for symbol in range(problem.symbols) for _i in range(string.count(symbol))]
    return [_] * (len(tokens) - len(string)) + rising


def palindromes(tokens, problem, scored):
    if len(tokens) % 2 == 0:
        assert tokens[0] == problem.symbols
        return [_, *palindromes(tokens[1:], problem, scored[1:])]
    middle = tokens.index(problem.symbols)
    left, right = tokens[:middle], tokens[middle + 1 :]
    assert len(left) == len(right)
    differences = sum(a != b for a, b in zip(left, reversed(right), strict=True))
    assert differences in (0, 1)
    return [_] * (len(tokens) - 1) + [1 - differences]


def stack_manipulation(tokens, problem, scored):
    if len(tokens) % 2 == 0:
        assert tokens[0] == 5
        return [_, *stack_manipulation(tokens[1:], problem, scored[1:])]
    count = tokens.index(5)
    assert tokens[count:] == [5] * (count + 1)
    stack, instructed = [], False
    for token in tokens[:count]:
        instructed |= token >= 2
        if token < 2:
            assert not instructed
            stack.append(token)
        elif token == 2:
            stack = stack[:-1]
        else:
            stack.append(token - 3)
    assert count == 1 or instructed
    answers = [*reversed(stack), 2]
    return [_] * count + answers + [_] * (count + 1 - len(answers))


def phonebook(tokens, problem, scored):
    question, blank = 10 + 2 * problem.names, 11 + 2 * problem.names
    at = tokens.index(question)
    front = tokens.count(blank)
    book = {}
    for t in range(front, at, 6):
        first, surname, *number = tokens[t : t + 6]
        assert 10 <= first < 10 + problem.names <= surname < question
        assert max(number) < 10
        assert (first, surname) not in book
        book[first, surname] = number
    number = book[tokens[at + 1], tokens[at + 2]]
    assert tokens[at + 3 :] == number[:3]
    return [_] * (at + 2) + number


def needle(tokens, problem, scored):
    *haystack, marker = tokens
    assert marker >= problem.symbols
    assert haystack.count(marker) == 1
    assert sum(token >= problem.symbols for token in haystack) == min(problem.needles, (len(tokens) - 1) // 2)
    value = haystack[haystack.index(marker) + 1]
    assert value < problem.symbols
    return [_] * len(haystack) + [value]


def in_context_recall(tokens, problem, scored):
    seen, targets = {}, [_] * len(tokens)
    for t in range(0, len(tokens), 2):
        if tokens[t] >= problem.symbols:
            assert t + 1 == len(tokens) or tokens[t + 1] >= problem.symbols
            continue
        if tokens[t] in seen:
            targets[t] = seen[tokens[t]]
        if t + 1 < len(tokens):
            assert problem.symbols // 2 <= tokens[t + 1] < problem.symbols
            assert seen.setdefault(tokens[t], tokens[t + 1]) == tokens[t + 1]
    assert targets[(len(tokens) - 1) // 2 * 2] != _
    return targets


def fuzzy_recall(tokens, problem, scored):
    keys, blank = (problem.vocabulary - 1) // 2, problem.vocabulary - 1
    front = tokens.count(blank)
    assert tokens[:front] == [blank] * front
    # The last value lacks its last token, which is a target only.
    seen, targets, t = {}, [_] * len(tokens), front
    while t < len(tokens):
        start = t
        while t < len(tokens) and tokens[t] < keys:
            t += 1
        key, middle = tuple(tokens[start:t]), t
        while t < len(tokens) and keys <= tokens[t] < blank:
            t += 1
        value = tokens[middle:t]
        assert len(set(key)) == len(key) <= problem.size
        assert len(key) == problem.size or not problem.longest_keys
        last = t == len(tokens)
        if key in seen:
            whole = seen[key]
            assert value == (whole[:-1] if last else whole)
            targets[middle - 1 : middle - 1 + len(whole)] = whole
        else:
            assert not last
            assert len(set(value)) == len(value) <= problem.size
            seen[key] = value
    return targets


def compression(tokens, problem, scored):
    if len(tokens) % 2 == 0:
        assert tokens[0] == problem.symbols + 1
        return [_, *compression(tokens[1:], problem, scored[1:])]
    end = tokens.index(problem.symbols)
    assert tokens[end + 1 :] == [problem.symbols + 1] * end
    return [_] * (end + 1) + tokens[:end]


def memorisation(tokens, problem, scored):
    insert, dictionary = problem.vocabulary - 1, problem.values.tolist()
    assert len(set(dictionary)) == len(dictionary)
    assert all((token == insert) == (t % 2 == 1) for t, token in enumerate(tokens))
    return [dictionary[tokens[t - 1]] if t % 2 else _ for t in range(len(tokens))]


def statements(tokens: list[int], words: int = 3) -> list[list[int]]:
    return [tokens[t : t + words] for t in range(0, len(tokens), words)]


OPERATIONS = ["set", "copy", "swap", "add", "sub", "mul", "if", "print", "maybe_swap", "maybe_add"]


def traces(tokens, problem, scored):
    """Runs every program on all states that are still possible."""
    m, k = problem.modulus, problem.variables
    targets, worlds = [], [[(a + 1) % m for a in range(k)]]
    for statement in statements(tokens):
        operation = OPERATIONS[statement[0] - m - k]
        answer = _
        if len(statement) > 1:
            a = statement[1] - m
            assert 0 <= a < k
        if operation == "print" and len(statement) > 1:
            values = {world[a] for world in worlds}
            if len(statement) == 3:
                assert statement[2] in values
                worlds = [world for world in worlds if world[a] == statement[2]]
            if len(values) == 1:
                (answer,) = values
        elif len(statement) == 3:
            worlds = [after for world in worlds for after in outcomes(operation, a, statement[2], world, m)]
            worlds = [list(world) for world in sorted({tuple(world) for world in worlds})]
            assert len(worlds) == 1 or problem.hidden
        targets += [_, answer, _][: len(statement)]
    return targets


def outcomes(operation: str, a: int, word: int, world: list[int], m: int) -> list[list[int]]:
    after, b = list(world), word - m
    assert (0 <= word < m) == (operation in ("set", "maybe_add"))
    assert a != b
    if operation == "set":
        after[a] = word
    elif operation == "copy":
        after[a] = world[b]
    elif operation in ("swap", "maybe_swap"):
        after[a], after[b] = world[b], world[a]
    elif operation == "add":
        after[a] = (world[a] + world[b]) % m
    elif operation == "sub":
        after[a] = (world[a] - world[b]) % m
    elif operation == "mul":
        after[a] = (world[a] * world[b]) % m
    elif operation == "if":
        after[b] = (world[b] + 1) % m if world[a] else world[b]
    else:
        assert operation == "maybe_add"
        after[a] = (world[a] + word) % m
    return [world, after] if operation.startswith("maybe") else [after]


def boxes(tokens, problem, scored):
    contents = [{o for o in range(problem.objects) if o % problem.boxes == box} for box in range(problem.boxes)]
    targets = []
    for statement in statements(tokens):
        operation, answer = statement[0] - problem.boxes - problem.objects, _
        if operation == 3 and len(statement) > 1:
            (answer,) = (box for box, things in enumerate(contents) if statement[1] - problem.boxes in things)
            assert statement[2:] in ([answer], [])
        elif len(statement) == 3:
            _code, first, box = statement
            if operation == 0:
                for things in contents:
                    things.discard(first - problem.boxes)
                contents[box].add(first - problem.boxes)
            elif operation == 1:
                assert first != box
                contents[box] |= contents[first]
                contents[first] = set()
            else:
                assert operation == 2
                assert first != box
                contents[first], contents[box] = contents[box], contents[first]
        targets += [_, answer, _][: len(statement)]
    return targets


def board(tokens, problem, scored):
    grid = [[None] * problem.width for _row in range(problem.height)]
    for piece in range(problem.pieces):
        grid[piece // problem.width][piece % problem.width] = piece
    squares = problem.height * problem.width
    targets = []
    for statement in statements(tokens):
        operation, answer = statement[0] - squares - problem.pieces - 4, _
        if len(statement) > 1:
            piece = statement[1] - squares
            ((row, column),) = [
                (i, j) for i in range(problem.height) for j in range(problem.width) if grid[i][j] == piece
            ]
        if operation == 2 and len(statement) > 1:
            answer = row * problem.width + column
            assert statement[2:] in ([answer], [])
        elif len(statement) == 3:
            if operation == 0:
                direction = statement[2] - squares - problem.pieces
                to = (row + (-1, 1, 0, 0)[direction], column + (0, 0, -1, 1)[direction])
            else:
                assert operation == 1
                to = (statement[2] // problem.width, statement[2] % problem.width)
            if 0 <= to[0] < problem.height and 0 <= to[1] < problem.width and grid[to[0]][to[1]] is None:
                grid[row][column], grid[to[0]][to[1]] = None, piece
        targets += [_, answer, _][: len(statement)]
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
    "mqar": mqar,
    "selective_copying": selective_copying,
    "copying": copying,
    "reversing": reversing,
    "palindromes": palindromes,
    "bucket_sort": bucket_sort,
    "stack_manipulation": stack_manipulation,
    "phonebook": phonebook,
    "needle": needle,
    "in_context_recall": in_context_recall,
    "noisy_recall": in_context_recall,
    "fuzzy_recall": fuzzy_recall,
    "compression": compression,
    "memorisation": memorisation,
    "traces": traces,
    "traces_hidden": traces,
    "boxes": boxes,
    "board": board,
}
