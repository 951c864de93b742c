"""What is known of a picture that is whole."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """Width and height in pixels, whether every pixel has the same colour, and whether it moves."""

    size: tuple[int, int]
    is_one_colour: bool = False
    is_animated: bool = False
