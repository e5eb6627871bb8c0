"""The books of the Bible, the held-out books, and the primary translation."""

from __future__ import annotations

PRIMARY_TRANSLATION = "kjv"
BOOKS = (
    "Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel|2 Samuel|1 Kings|2 Kings|1 Chronicles|"
    "2 Chronicles|Ezra|Nehemiah|Esther|Job|Psalms|Proverbs|Ecclesiastes|Song of Songs|Isaiah|Jeremiah|Lamentations|"
    "Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|Micah|Nahum|Habakkuk|Zephaniah|Haggai|Zechariah|Malachi|Matthew|Mark|"
    "Luke|John|Acts|Romans|1 Corinthians|2 Corinthians|Galatians|Ephesians|Philippians|Colossians|1 Thessalonians|"
    "2 Thessalonians|1 Timothy|2 Timothy|Titus|Philemon|Hebrews|James|1 Peter|2 Peter|1 John|2 John|3 John|Jude|"
    "Revelation"
).split("|")
HELD_OUT = dict.fromkeys(("Ruth", "Jonah", "Philippians", "James"), "validation") | dict.fromkeys(
    ("Esther", "Ecclesiastes", "Habakkuk", "Galatians", "1 Peter"), "test"
)
