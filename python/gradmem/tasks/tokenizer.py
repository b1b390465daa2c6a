"""Characters as tokens."""

from __future__ import annotations

from collections.abc import Iterable

from gradmem_kernels.checks import ArgumentError

__all__ = ["CharTokenizer"]


class CharTokenizer:
    """One token per character of ``characters``, in order, from id 1; id 0 is padding.

    Raises:
        ArgumentError: if a character comes twice.
    """

    pad_id = 0

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._ids = {character: i for i, character in enumerate(characters, 1)}
        if len(self._ids) != len(characters):
            raise ArgumentError(f"CharTokenizer: characters: expected different characters, got {characters!r}")

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """The token ids.

        Raises:
            ArgumentError: for a character that is not in the vocabulary.
        """
        for position, character in enumerate(text):
            if character not in self._ids:
                raise ArgumentError(f"CharTokenizer: text: expected characters of {self.characters!r}, got "
                                    f"{character!r} at position {position}")
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; padding is left out."""
        return "".join(self.characters[i - 1] for i in ids if i != self.pad_id)
