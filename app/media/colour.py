"""Whether all pixels of a PNG are the same, by its rows as they are stored."""

# Longer rows are not held in memory to be looked at, and of shorter ones there may be millions.
_ROW_BYTES = range(64, 1 << 18)


class OneColourCheck:
    """Looks at the inflated rows while they come; the first other pixel ends it.

    What each filter makes of one pixel again and again is known: sections 9.2 to 9.4 of the PNG
    specification (w3.org/TR/png-3). `holds` is the answer so far.
    """

    def __init__(self, row_bytes: int, bits_per_pixel: int, *, interlaced: bool) -> None:
        """`row_bytes` with the number of the row's filter, as it is stored.

        Of an interlaced picture, whose rows have different lengths, it tells nothing.
        """
        self._row_bytes = row_bytes
        self._bits_per_pixel = bits_per_pixel
        self._held = b""
        self._wanted: list[bytes] = []  # of each filter, the rows but for the first
        self.holds = row_bytes in _ROW_BYTES and not interlaced

    def feed(self, rows: bytes) -> None:
        """Take the next bytes of the rows."""
        if not self.holds:
            return
        held = self._held + rows
        end = len(held) - len(held) % self._row_bytes
        whole = (held[at : at + self._row_bytes] for at in range(0, end, self._row_bytes))
        self.holds = all(self._is_same(row) for row in whole)
        self._held = held[end:]

    def _is_same(self, row: bytes) -> bool:
        return row == self._wanted[row[0]] if self._wanted else self._begins(row)

    def _begins(self, row: bytes) -> bool:
        """Learn the pixel from the first row: there every filter stores the first one as it is."""
        pixel = row[1 : 1 + max(1, self._bits_per_pixel // 8)]
        none, half = bytes(len(pixel)), bytes(value - value // 2 for value in pixel)
        first = [(pixel, pixel), (pixel, none), (pixel, pixel), (pixel, half), (pixel, none)]
        later = [(pixel, pixel), (pixel, none), (none, none), (half, none), (none, none)]
        self._wanted = [self._row(number, *pixels) for number, pixels in enumerate(later)]
        return self._is_one_pixel(pixel[0]) and row == self._row(row[0], *first[row[0]])

    def _row(self, number: int, first: bytes, others: bytes) -> bytes:
        return bytes([number]) + first + others * ((self._row_bytes - 1) // len(first) - 1)

    def _is_one_pixel(self, byte: int) -> bool:
        """Tell whether the pixels that share a byte are the same."""
        if self._bits_per_pixel >= 8:
            return True
        mask = (1 << self._bits_per_pixel) - 1
        return byte == (byte & mask) * (0xFF // mask)
