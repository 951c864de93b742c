"""A governor without limits: for tests of something else."""

from app.providers.governor import Call


class Ungoverned:
    """Lets everything pass."""

    async def admit(self, call: Call) -> None:
        """See `Governor.admit`."""

    async def throttled(self, call: Call, seconds: float) -> None:
        """See `Governor.throttled`."""

    async def succeeded(self, call: Call) -> None:
        """See `Governor.succeeded`."""

    async def failed(self, call: Call) -> None:
        """See `Governor.failed`."""

    async def aclose(self) -> None:
        """See `Governor.aclose`."""
