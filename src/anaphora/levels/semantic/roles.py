"""Who does what to whom, as far as the order of words and prepositions tell. Pure."""

from __future__ import annotations

from anaphora.levels.semantic.facts import Facts


def crossed(a: Facts, b: Facts) -> bool:
    """From X to Y, from Y to X; X than Y, Y than X."""
    raw = {(role, b.roles[word]) for word, role in a.roles.items() if word in b.roles and role != b.roles[word]}
    moved = {(_role(here), _role(there)) for here, there in raw if _role(here) != _role(there)}
    return any((there, here) in pairs for pairs in (moved, raw) for here, there in pairs)


def _role(preposition: str) -> str:
    """`Convert X to Y` and `convert from X to Y` are the same."""
    return "" if preposition in ("from", "de", "desde", "из", "с") else preposition


def turned_round(a: Facts, b: Facts) -> bool:
    """Dog bites man, man bites dog."""
    if a.agents or b.agents:
        return False
    place = {word: number for number, word in enumerate(b.order)}
    there = [place[word] for word in a.order if word in place]
    if (
        len(there) == 2
        and there[0] > there[1]
        and (set(a.order) & set(b.order) <= a.names & b.names or a.question == b.question == "who")
    ):
        return True  # what did Ann tell Bob; who beat Brazil, who did Brazil beat
    return any(max(there[:middle]) > there[middle] > min(there[middle + 1 :]) for middle in range(1, len(there) - 1))


def another_agent(passive: Facts, active: Facts) -> bool:
    """The farm is used by Adam, the farm uses Adam."""
    if not passive.agents or active.agents or passive.question or active.question:
        return False
    for agent in passive.agents & set(active.order):
        earlier = active.order[: active.order.index(agent)]
        if any(word in passive.order for word in earlier):
            return True
    return False
