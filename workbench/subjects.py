"""Guesses which words of a typed sentence the fact is about; the user corrects the guess."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORD = re.compile(r"[^\W_][\w'’.&-]*", re.UNICODE)

_OPENERS = frozenset(
    """a about according after an and as asked at before by did do does during everyone for from he her his how i if in is it its
    my of on one our people she since that the their there these they this those to travellers under visitors was we were what when
    where which while who whose why with you your question answer name""".split()
)
"""Words that are capitalised for standing first, or that belong to no name."""

_JOINERS = frozenset("of the and de del della di da dos du la le van von der den bin al el y for in on".split())
"""Small words inside of a name: Bridge of Sighs, Leonardo da Vinci."""


def guess_subject(text: str, known: Iterable[str] = ()) -> str:
    """The words the sentence is probably about, as they stand in it; empty where there is nothing to choose from.

    1. The longest subject that is known and stands in the text as whole words.
    2. Else the longest run of capitalised words (small joining words inside of it count), where a first word such as `The`
       does not begin one.
    3. Else the longest word.
    """
    text = text.strip()
    inside = [name for name in known if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    if inside:
        return max(inside, key=len)
    words = list(_WORD.finditer(text))
    if not words:
        return ""
    runs, run = [], list[re.Match[str]]()
    previous_end = 0
    for word in words:
        gap = text[previous_end : word.start()]
        previous_end = word.end()
        if run and gap.strip():
            runs.append(run)
            run = []
        plain = _plain(word.group())
        named = plain[0].isupper() and plain.lower() not in _OPENERS
        if named or (run and plain.lower() in _JOINERS):
            run.append(word)
        elif run:
            runs.append(run)
            run = []
    runs.append(run)
    spans = []
    for found in runs:
        while found and found[-1].group().lower() in _JOINERS:
            found = found[:-1]
        if found:
            spans.append((found[0].start(), found[-1].start() + len(_plain(found[-1].group()))))
    if not spans:
        longest = max(words, key=lambda word: len(word.group()))
        return _plain(longest.group())
    start, stop = max(spans, key=lambda span: span[1] - span[0])
    return text[start:stop]


def _plain(word: str) -> str:
    """A word without what hangs on its end: a possessive 's, a full stop."""
    return re.sub(r"(['’]s|['’])$", "", word.rstrip(".-")) or word
