"""Pings are sent where somebody is likely to come back, shortly before the entry ends, and only within the budget."""

from __future__ import annotations

from tests.optimiser.traffic import Site, body, chat_turns

from anaphora.optimiser import Ping, ping_due


def returning(gap_s: float, num: int = 12) -> Site:
    """People who always come back after so long."""
    site = Site()
    for number in range(num):
        for turn in range(6):
            site.ask(body(*chat_turns(f"Talk {number}.", turn)), gap_s)
    return site


def ping(site: Site, after_s: float, budget_tokens: float = 1e9) -> Ping:
    prompt, lengths = site.read(body(*chat_turns("Talk 11.", 2)))
    now_s = site.now_s + after_s
    found = (prompt, lengths, site.profile, site.history)
    return ping_due(*found, asked_s=site.now_s, now_s=now_s, budget_tokens=budget_tokens)


def marked(site: Site) -> Site:
    """The last prompt is in the provider's cache for five minutes."""
    request = body(*chat_turns("Talk 11.", 2), cache_control={"type": "ephemeral"})
    prompt, lengths = site.read(request)
    site.history._entries.clear()
    known = site.history.know(prompt, site.profile, site.now_s)
    site.history.learn(prompt, lengths, site.profile, known, site.now_s)
    return site


def test_a_ping_waits_until_the_entry_is_about_to_end() -> None:
    site = marked(returning(250.0))
    found = ping(site, 100.0)
    assert (found.due, found.reason) == (False, "not yet")
    assert found.again_s == site.now_s + 280.0


def test_it_is_sent_where_people_come_back_a_little_later() -> None:
    """9 % are enough: a read costs 0.1 and a write 1.25."""
    found = ping(marked(returning(900.0)), 285.0)
    assert found.due
    assert found.gain > 0
    assert found.usd is not None


def test_it_is_not_sent_where_nobody_comes_back_then() -> None:
    found = ping(marked(returning(20.0)), 285.0)
    assert not found.due
    assert found.gain <= 0
    assert found.again_s is None


def test_it_is_not_sent_once_the_budget_is_spent() -> None:
    site = marked(returning(900.0))
    cost = ping(site, 285.0).tokens
    assert ping(site, 285.0, budget_tokens=cost).due
    assert not ping(site, 285.0, budget_tokens=cost - 1).due


def test_an_entry_that_has_ended_is_given_up() -> None:
    assert ping(marked(returning(900.0)), 301.0).reason == "the entry is gone"
