"""What is known of a picture that is whole."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """Width and height in pixels, and whether every pixel has the same colour."""

    size: tuple[int, int]
    is_one_colour: bool = False
