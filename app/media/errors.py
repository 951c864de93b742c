"""What can be wrong with an output file."""


class BadPicture(Exception):
    """Not a whole picture that may be kept; the message is fit for the client."""

    def __init__(self, message: str = "The picture is damaged.") -> None:
        super().__init__(message)


class TooLargeToDecode(BadPicture):
    """Nothing is known to be wrong with it, but decoding takes more memory than it may."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__("The picture takes too much memory to decode.")
        self.size = width, height
