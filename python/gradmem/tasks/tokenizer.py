"""Text as tokens: characters, bytes, or the tokenizer of a pre-trained model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from gradmem_kernels.checks import ArgumentError

__all__ = ["ByteTokenizer", "CharTokenizer", "PretrainedTokenizer", "Tokenizer"]


class Tokenizer(Protocol):
    """What tasks and commands ask of a tokenizer.

    Attributes:
        pad_id: fills rows up; nothing reads it.
        end_id: where it is generated, the answer ends.
    """

    pad_id: int
    end_id: int

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """The token ids."""
        ...

    def encode_target(self, text: str) -> tuple[list[int], int]:
        """The token ids of an answer with its end, and how many of them exact match counts, from the first on."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text."""
        ...

    def answer(self, ids: Iterable[int]) -> str:
        """The text of a generated answer, up to its end."""
        ...


class _WithEndToken:
    """Answers end with a token that no text has. Exact match counts it: a right answer also ends where it should."""

    end_id: int

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError

    def encode_target(self, text: str) -> tuple[list[int], int]:
        ids = [*self.encode(text), self.end_id]
        return ids, len(ids)

    def answer(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        return self.decode(ids[: ids.index(self.end_id)] if self.end_id in ids else ids)


def _utf8(tokenizer: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as reason:  # JSON's escapes, and arguments of a command that are no UTF-8, can hold it
        raise ArgumentError(f"{tokenizer}: text: expected whole characters, got half a surrogate pair, "
                            f"{text[reason.start]!r}, at position {reason.start}") from reason


class ByteTokenizer(_WithEndToken):
    """One token per byte of UTF-8: byte ``b`` is token ``b + 2``. Id 0 is padding, id 1 ends an answer."""

    pad_id, end_id, vocab_size = 0, 1, 258

    def encode(self, text: str) -> list[int]:
        """The token ids.

        Raises:
            ArgumentError: for half a surrogate pair.
        """
        return [byte + 2 for byte in _utf8("ByteTokenizer", text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; padding and ends are left out. Bytes that are no UTF-8 become U+FFFD, and so do ids that are no
        bytes, as a model with more tokens may generate them."""
        return bytes(min(i - 2, 0xFF) for i in ids if i >= 2).decode("utf-8", errors="replace")  # no UTF-8 has 0xFF


class PretrainedTokenizer(_WithEndToken):
    """A tokenizer of ``transformers``, without the special tokens that it would add.

    Args:
        tokenizer: has an end-of-sequence token.

    Raises:
        ArgumentError: if it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ArgumentError(f"PretrainedTokenizer: tokenizer: expected one with an end-of-sequence token, got "
                                f"{tokenizer.name_or_path or type(tokenizer).__name__}, whose eos_token is None; set "
                                f"one in its configuration")
        self.end_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """The token ids.

        Raises:
            ArgumentError: for half a surrogate pair.
        """
        _utf8("PretrainedTokenizer", text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


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
