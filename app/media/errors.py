"""What can be wrong with an output file."""


class BadPicture(Exception):
    """Not a whole picture that may be kept; the message is fit for the client."""

    def __init__(self, message: str = "The picture is damaged.") -> None:
        super().__init__(message)
