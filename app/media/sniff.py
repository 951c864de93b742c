"""What a file is, by its first bytes: never by what a server says it is."""

HEAD_BYTES = 512

PNG = "image/png"
PICTURES = frozenset({PNG, "image/jpeg", "image/webp", "image/gif", "image/avif"})

EXTENSIONS = {
    PNG: "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/avif": "avif",
    "image/svg+xml": "svg",
    "image/heic": "heic",
    "image/tiff": "tiff",
    "video/mp4": "mp4",
    "video/quicktime": "mov",
    "video/webm": "webm",
    "audio/mpeg": "mp3",
    "audio/mp4": "m4a",
    "audio/aac": "aac",
    "audio/wav": "wav",
    "audio/ogg": "ogg",
    "audio/flac": "flac",
    "model/gltf-binary": "glb",
    "application/pdf": "pdf",
    "application/zip": "zip",
    "text/html": "html",
    "text/plain": "txt",
    "application/json": "json",
    "application/octet-stream": "bin",
}
_TYPES = {extension: media_type for media_type, extension in EXTENSIONS.items()}

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"\x1aE\xdf\xa3", "video/webm"),
    (b"ID3", "audio/mpeg"),
    # MPEG audio: a frame of layer 3, or an ADTS frame.
    *((b"\xff" + second, "audio/mpeg") for second in (b"\xfb", b"\xfa", b"\xf3", b"\xf2")),
    *((b"\xff" + second, "audio/aac") for second in (b"\xf1", b"\xf9")),
    (b"OggS", "audio/ogg"),
    (b"fLaC", "audio/flac"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"glTF", "model/gltf-binary"),
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
)
# ISO base media files by their brand; any other is a video. Two say only that it is a picture (or a
# sequence), and what else it is compatible with follows.
_BRANDS_OF_PICTURES = (b"mif1", b"msf1")
_BRANDS = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"qt  ": "video/quicktime",
    b"M4A ": "audio/mp4",
}
_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}


def media_type(head: bytes) -> str:
    """Return the media type of a file that begins with `head` (up to `HEAD_BYTES` bytes)."""
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12], "application/octet-stream")
    if head[4:8] == b"ftyp":
        return _of_brand(head)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in start:
        return "image/svg+xml"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "text/html"
    return "application/octet-stream"


def content_type(name: str) -> str:
    """Return what a file of ours is served as, by its extension. Texts are UTF-8: we wrote them."""
    media_type = _TYPES.get(name.rpartition(".")[2], "application/octet-stream")
    return "text/plain; charset=utf-8" if media_type == "text/plain" else media_type


def _of_brand(head: bytes) -> str:
    brand = head[8:12]
    if brand in _BRANDS_OF_PICTURES:
        box = head[: int.from_bytes(head[:4])]
        compatible = (box[at : at + 4] for at in range(16, len(box), 4))
        brand = next((other for other in compatible if other in _BRANDS), brand)
    return _BRANDS.get(brand, "video/mp4")
