"""Outputs and metadata on disk (top-level `storage/` is the data, this the code)."""

from app.config import Settings
from app.storage.base import Storage
from app.storage.local import LocalStorage


def create_storage(settings: Settings) -> Storage:
    """Return the storage that the settings name."""
    return LocalStorage(settings.storage_path, settings.metadata_directory)
