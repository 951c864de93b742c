"""Opaque page cursors: the place of the last job seen, (created_at, id), in 32 characters."""

import base64
import struct
from datetime import UTC, datetime, timedelta
from uuid import UUID

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAYOUT = struct.Struct(">q16s")  # microseconds since 1970, the id's bytes


def encode_cursor(created_at: datetime, job_id: UUID) -> str:
    """Return the cursor of the page that follows this job."""
    microseconds = (created_at - EPOCH) // timedelta(microseconds=1)
    return base64.urlsafe_b64encode(LAYOUT.pack(microseconds, job_id.bytes)).decode()


def decode_cursor(cursor: str) -> tuple[datetime, UUID]:
    """Return what `encode_cursor` was given. Raises: ValueError - it never made this one."""
    try:
        microseconds, id_bytes = LAYOUT.unpack(base64.b64decode(cursor, b"-_", validate=True))
        return EPOCH + timedelta(microseconds=microseconds), UUID(bytes=id_bytes)
    except (ValueError, struct.error, OverflowError):
        raise ValueError("is not a cursor of this service") from None
