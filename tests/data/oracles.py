"""What is due, worked out from a row as its definition says, and what a guesser chooses from."""

import ast
import operator


def mqar(task, tokens, at):
    known = dict(zip(tokens[0 : 2 * task.pairs : 2], tokens[1 : 2 * task.pairs : 2], strict=True))
    return [known[tokens[t]] for t in at]


def selective_copying(task, tokens, at):
    data = [token for token in tokens if 0 < token < task.vocabulary - 1]
    assert len(at) == task.answers
    return data


def induction(task, tokens, at):
    assert at == [len(tokens) - 1]
    return [tokens[tokens.index(task.vocabulary - 1) + 1]]


def parity(task, tokens, at):
    return [tokens[: t + 1].count(1) % 2 for t in at]


def words(task, tokens, at):
    """Each point's way through the permutations, one after the other."""
    names, found = task.symbols(), []
    state = None
    for token in tokens:
        name = [int(c) for c in names[token]] if task.group != "Z60" else int(names[token])
        if task.group == "Z60":
            state = name if state is None else (state + name) % 60
            found.append(names.index(str(state)))
            continue
        turn, points = [], len(name)
        if task.group == "A4xZ5":
            points, turn = 4, [(name[4] + (state[4] if state else 0)) % 5]
        state = name if state is None else [*(name[p] for p in state[:points]), *turn]
        found.append(names.index("".join(map(str, state))))
    return [found[t] for t in at]


def arithmetic(task, tokens, at):
    (end,) = at
    text = "".join(task.symbols()[token] for token in tokens[:end])
    assert task.symbols()[tokens[end]] == "="
    return [value(ast.parse(text, mode="eval").body) % task.modulus]


def value(node):
    """Of a formula, by Python's own rules of precedence."""
    if isinstance(node, ast.Constant):
        return node.value
    act = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[type(node.op)]
    return act(value(node.left), value(node.right))


def copying(task, tokens, at):
    bar = task.letters + 1
    string = tokens[1 : tokens.index(bar)]
    turned = {"same": string, "reverse": string[::-1], "sorted": sorted(string)}[task.order]
    assert at[0] == len(string) + 1
    return [*turned, task.letters + 2]


ORACLES = {
    "copying": copying,
    "words": words,
    "arithmetic": arithmetic,
    "mqar": mqar,
    "selective_copying": selective_copying,
    "induction": induction,
    "parity": parity,
}
GUESSES = {
    "copying": lambda task, tokens: range(task.letters),
    "words": lambda task, tokens: range(len(task.symbols())),
    "arithmetic": lambda task, tokens: range(task.modulus),
    "mqar": lambda task, tokens: tokens[1 : 2 * task.pairs : 2],
    "selective_copying": lambda task, tokens: range(1, task.vocabulary - 1),
    "induction": lambda task, tokens: range(task.vocabulary - 1),
    "parity": lambda task, tokens: (0, 1),
}
