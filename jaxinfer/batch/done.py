"""Which lines are done: a bit a line, so that a million lines take 125 kB. Knows numbers only."""

from collections.abc import Iterable


class DoneIndex:
    """A growing set of positive integers."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __contains__(self, number: int) -> bool:
        byte, bit = divmod(number, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)

    def __len__(self) -> int:
        return self._count

    def add(self, number: int) -> None:
        """Adds `number`; adding it again changes nothing."""
        byte, bit = divmod(number, 8)
        if byte >= len(self._bits):
            # By an eighth, or a file that is written in order would be copied at every byte.
            self._bits.extend(bytes(byte + 1 - len(self._bits) + len(self._bits) // 8))
        if not self._bits[byte] >> bit & 1:
            self._bits[byte] |= 1 << bit
            self._count += 1

    def update(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.add(number)
