"""What a file is, by its first bytes."""

from io import BytesIO

import pytest
from PIL import Image

from app.media import sniff
from app.media.sniff import EXTENSIONS, content_type


@pytest.mark.parametrize(
    ("pillow_format", "media_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("WEBP", "image/webp"),
        ("GIF", "image/gif"),
        ("AVIF", "image/avif"),
    ],
)
def test_pictures_as_pillow_writes_them(pillow_format: str, media_type: str) -> None:
    file = BytesIO()
    Image.new("RGB", (16, 16), "teal").save(file, pillow_format)
    found = sniff.media_type(file.getvalue()[: sniff.HEAD_BYTES])
    assert found == media_type
    assert found in sniff.PICTURES


@pytest.mark.parametrize(
    ("head", "media_type"),
    [
        (b"GIF87a\x01\x00", "image/gif"),
        (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "video/mp4"),
        (b"\x00\x00\x00\x1cftypavis", "image/avif"),
        (b"\x1aE\xdf\xa3\x01\x00", "video/webm"),
        (b"ID3\x04\x00", "audio/mpeg"),
        (b"\xff\xfb\x90\x64", "audio/mpeg"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "audio/wav"),
        (b"RIFF\x24\x00\x00\x00AVI LIST", "application/octet-stream"),
        (b"OggS\x00\x02", "audio/ogg"),
        (b"fLaC\x00\x00", "audio/flac"),
        (b"\xff\xf3\x40\xc0", "audio/mpeg"),
        (b"\xff\xf1\x50\x80", "audio/aac"),
        (b"\x00\x00\x00\x14ftypqt  ", "video/quicktime"),
        (b"\x00\x00\x00\x1cftypM4A ", "audio/mp4"),
        (b"\x00\x00\x00\x18ftypheic", "image/heic"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avifmiaf", "image/avif"),
        (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic", "image/heic"),
        (b"\x00\x00\x00\x14ftypmif1\x00\x00\x00\x00mif1avif", "video/mp4"),
        (b"\xff\xff\xff\xffftypmif1", "video/mp4"),
        (b"II*\x00\x08\x00", "image/tiff"),
        (b"MM\x00*\x00\x00", "image/tiff"),
        (b"glTF\x02\x00\x00\x00", "model/gltf-binary"),
        (b"%PDF-1.7", "application/pdf"),
        (b"PK\x03\x04", "application/zip"),
        (b"plain words", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_other_files(head: bytes, media_type: str) -> None:
    assert sniff.media_type(head) == media_type


@pytest.mark.parametrize(
    "head",
    [
        b"<!DOCTYPE html><html>",
        b"<!doctype HTML>",
        b"\r\n\t <html lang='en'>",
        b"<HTML>",
        b"\xef\xbb\xbf<!DOCTYPE html>",
        b"<head><title>502 Bad Gateway</title>",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>",
        b"<?xml version='1.0'?><!DOCTYPE html><html xmlns='http://www.w3.org/1999/xhtml'>",
    ],
)
def test_pages_and_error_documents_are_html(head: bytes) -> None:
    assert sniff.media_type(head) == "text/html"


@pytest.mark.parametrize(
    "head",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'>",
        b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='10'>",
        b"\xef\xbb\xbf<?xml version='1.0'?><!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN' ''><svg>",
    ],
)
def test_a_drawing_is_not_mistaken_for_a_page(head: bytes) -> None:
    assert sniff.media_type(head) == "image/svg+xml"
    assert "image/svg+xml" not in sniff.PICTURES  # kept as it is: no pixels to check


@pytest.mark.parametrize("length", range(12))
def test_a_beginning_that_is_too_short_tells_nothing_wrong(length: int) -> None:
    assert sniff.media_type(b"RIFF\x24\x00\x00\x00WEBP"[:length]) == "application/octet-stream"


@pytest.mark.parametrize(("media_type", "extension"), EXTENSIONS.items())
def test_a_file_is_served_as_what_it_is(media_type: str, extension: str) -> None:
    served_as = content_type(f"5-1.{extension}")
    assert served_as == ("text/plain; charset=utf-8" if extension == "txt" else media_type)


def test_every_type_has_an_extension_of_its_own() -> None:
    assert len(set(sniff.EXTENSIONS.values())) == len(sniff.EXTENSIONS)
    tables = (sniff._RIFF, sniff._BRANDS)
    found = {found for _, found in sniff._MAGIC} | {kind for t in tables for kind in t.values()}
    assert (found | sniff.PICTURES) <= sniff.EXTENSIONS.keys()
