"""Replicate over HTTP, by the official package's low-level calls.

Facts about the API come from its OpenAPI schema (api.replicate.com/openapi.json) and its docs.
"""

from app.providers.replicate.client import ReplicateProvider

__all__ = ["ReplicateProvider"]
