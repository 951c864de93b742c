"""What can be wrong with an output file."""


class BadPicture(Exception):
    """Not a whole picture that may be kept; the message is fit for the client.

    Without one it is damaged, which another download of it may not be.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or "The picture is damaged.")
        self.is_damaged = message is None


class TooLargeToDecode(BadPicture):
    """Nothing is known to be wrong with it, but to decode it takes more than it may."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__("The picture takes too much memory, or time, to decode.")
        self.size = width, height
