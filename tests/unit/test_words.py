"""`python -m tests.words` finds forbidden words, and says where they are and what to write instead."""

from __future__ import annotations

import pytest

from tests.words import Rules, WordException, check, read_rules

_RULES = Rules({"tidings": "events", "for ever": "forever"})


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("no\n# the Tidings of it\n", 'a.py:2: "tidings": events'),
        ("class WatchTidings:\n", 'a.py:1: "tidings": events'),
        ("no_tidings = 1\n", 'a.py:1: "tidings": events'),
        ("NO_TIDINGS = 1\n", 'a.py:1: "tidings": events'),
        ("# kept for\n# ever\n", 'a.py:1: "for ever": forever'),
        ('("kept for"\n " ever")\n', 'a.py:1: "for ever": forever'),
        ("tidingsman, or for everyone\n", None),
    ],
)
def test_a_word_is_found_in_prose_and_in_names(text: str, finding: str | None) -> None:
    assert list(_RULES.findings("a.py", text)) == ([finding] if finding else [])


def test_a_word_in_the_name_of_a_file_is_found() -> None:
    assert list(_RULES.findings("core/tidings.py", "")) == ['core/tidings.py:0: "tidings": events']


def test_an_exception_is_for_one_word_in_its_files_and_lines() -> None:
    exception = WordException("tidings", "a/*", "stored", text='"tidings"')
    rules = Rules(_RULES.instead, (exception,))
    text = 'x = "tidings"\ny = tidings\n'
    assert list(rules.findings("a/b.py", text)) == ['a/b.py:2: "tidings": events']
    assert len(list(rules.findings("b.py", text))) == 2


def test_an_exception_that_is_not_needed_is_a_problem() -> None:
    exception = WordException("tidings", "nowhere/*", "stored")
    assert check(Rules(_RULES.instead, (exception,)), []) == [
        'tests/words.toml: exception "tidings" in nowhere/* is not needed'
    ]


def test_every_word_is_found_as_it_is_written_and_has_a_replacement() -> None:
    rules, patterns = read_rules()
    assert "server/*.py" in patterns
    for word, instead in rules.instead.items():
        assert instead
        if word.replace(" ", "").isalpha():
            assert len(list(rules.findings("a.py", word))) >= 1, word
    assert all(each.reason and each.word in rules.instead for each in rules.exceptions)
