"""Words as people say them."""


def counted(count: int, word: str, many: str | None = None) -> str:
    """`1 gate`, `3 gates`, `1,024 tokens`; `many` is the plural of a word that takes more than an s."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"
