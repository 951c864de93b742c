"""How large a WebP is, by its header alone.

Source: "WebP Container Specification" (developers.google.com/speed/webp/docs/riff_container),
RFC 6386 section 9.1 for VP8, "WebP Lossless Bitstream" section 3 for VP8L.
"""

HEAD_BYTES = 30


def canvas(head: bytes) -> tuple[int, int] | None:
    """Return width and height, or None if `head`, the first `HEAD_BYTES`, is no WebP's."""
    if len(head) < HEAD_BYTES or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    match head[12:16]:
        case b"VP8X":
            return _number(head[24:27]) + 1, _number(head[27:30]) + 1
        case b"VP8L":
            bits = _number(head[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return _number(head[26:28]) & 0x3FFF, _number(head[28:30]) & 0x3FFF
    return None


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
