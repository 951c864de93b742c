"""Outputs and metadata in folders or a bucket (top-level `storage/` is data, this the code)."""

import os
import tempfile
from pathlib import Path

from app.config import Settings
from app.storage.base import Storage
from app.storage.local import LocalStorage
from app.storage.s3 import S3Storage


def create_storage(settings: Settings) -> Storage:
    """Return the storage that the settings name."""
    if settings.storage_url is None or settings.is_storage_local:
        return LocalStorage(settings.media_directory, settings.metadata_directory)
    secret = settings.aws_secret_access_key
    return S3Storage(
        settings.storage_url,
        Path(tempfile.gettempdir()) / f"replicate-media-service-{os.getuid()}",
        endpoint_url=settings.aws_endpoint_url,
        public_endpoint_url=settings.aws_public_endpoint_url,
        region=settings.aws_region,
        access_key_id=settings.aws_access_key_id,
        secret_access_key=secret.get_secret_value() if secret else None,
    )
