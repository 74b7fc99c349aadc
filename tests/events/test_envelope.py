"""Topics as callers write them, and what a stream wants of what it may see."""

from __future__ import annotations

import pytest

from events.envelope import Interest, parse_topics, topic_of


@pytest.mark.parametrize(
    ("raw", "parsed"),
    [
        ("", None),
        (" , ,", None),
        ("tasks", {"tasks"}),
        ("connection:ma_1, tasks", {"connection:ma_1", "tasks"}),
        ("task:a:b", {"task:a:b"}),
        ("clients,client:conn-1", {"clients", "client:conn-1"}),
    ],
)
def test_topics_are_read(raw: str, parsed: set[str] | None) -> None:
    assert parse_topics(raw) == (None if parsed is None else frozenset(parsed))


@pytest.mark.parametrize(
    "raw",
    ["nonsense", "connection:", ":x", "flow:1", "tasks:1", "connection:" + "x" * 81, "tasks,,bad topic"],
)
def test_a_topic_of_no_known_form_is_refused_with_a_sentence(raw: str) -> None:
    with pytest.raises(ValueError, match="Unknown topic"):
        parse_topics(raw)


def test_more_than_a_hundred_topics_are_refused() -> None:
    assert len(parse_topics(",".join(f"task:{n}" for n in range(100))) or ()) == 100
    with pytest.raises(ValueError, match="100"):
        parse_topics(",".join(f"task:{n}" for n in range(101)))


def test_C05_interest_is_permission_first_and_topic_second() -> None:
    mine = Interest(audiences=frozenset({1}))
    assert mine.wants("task:1", 1)
    assert not mine.wants("task:1", 2)
    everybody = Interest()
    assert everybody.wants("task:1", 99)
    narrow = Interest(topics=frozenset({"task:1", "connections"}), audiences=frozenset({1}))
    assert narrow.wants("task:1", 1)
    assert narrow.wants("connection:x", 1)
    assert not narrow.wants("task:2", 1)
    assert not narrow.wants("connection:x", 2)
    assert not Interest(topics=frozenset({"task:1"})).wants("task:10", 1)
    assert not Interest(audiences=frozenset()).wants("task:1", 1)


def test_a_topic_is_its_kind_and_id() -> None:
    assert topic_of("task", "t1") == "task:t1"
