"""Kinds of gates in words: what pages and figures say of them (docs/theory.md, section 6.2)."""

from experiments.frame.settings import GateKind

RHO: dict[GateKind, str] = {  # gain of the difference mode on values and keys, `ou_theory.attention.rho`
    "joint": "(1 − g) / (1 + g)",
    "blend": "(1 − g) / (1 + g)",
    "convex": "1 − 2g",
    "additive": "1 − g",
    "tanh": "1 − tanh g",
}
COMMON: dict[GateKind, str] = {  # of the common mode, and of queries, `ou_theory.attention.common_gain`
    "joint": "1",
    "blend": "1",
    "convex": "1",
    "additive": "1 + g",
    "tanh": "1 + tanh g",
}
OWN: dict[GateKind, str] = {  # weight of a replica's own keys at equal replicas
    "joint": "1 / (1 + g)",
    "blend": "1 / (1 + g)",
    "convex": "1 − g",
    "additive": "1",
    "tanh": "1",
}


def told(kind: GateKind) -> str:
    """What a coupling g of this kind does, in a sentence for readers who know attention."""
    return {
        "joint": "one softmax runs over the tokens of both, and g multiplies the weights of the other's. At g = 0 they "
        "are strangers, at g = 1 the other's tokens count as much as one's own.",
        "blend": "each one reads its own tokens and the other's with a softmax of its own, and takes the mean with the "
        "weights 1 and g. At g = 0 they are strangers, at g = 1 both readings count the same.",
        "convex": "each one reads its own tokens and the other's with a softmax of its own, and takes 1 − g of the one "
        "and g of the other. At g = 0 they are strangers, at g = 1/2 both readings count the same, at g = 1 each reads "
        "the other alone.",
        "additive": "each one reads its own tokens and the other's with a softmax of its own, and g times the other "
        "reading is added. At g = 0 they are strangers. What both have in common is read 1 + g times, for which the "
        "network was not trained.",
        "tanh": "each one reads its own tokens and the other's with a softmax of its own, and tanh g times the other "
        "reading is added. At g = 0 they are strangers. What both have in common is read 1 + tanh g times, for which "
        "the network was not trained.",
    }[kind]
