"""What the Replicate double publishes about its models: one schema, the same for all of them."""

import hashlib
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator

OUTPUT_FORMATS = ["webp", "jpg", "png"]

# An enumeration hides behind allOf + $ref in recorded schemas, so it does here.
OPENAPI_SCHEMA: dict[str, Any] = {
    "openapi": "3.0.2",
    "info": {"title": "Cog", "version": "0.1.0"},
    "paths": {},
    "components": {
        "schemas": {
            "Input": {
                "type": "object",
                "title": "Input",
                "required": ["prompt"],
                "properties": {
                    "prompt": {"type": "string", "title": "Prompt", "x-order": 0},
                    "width": {"type": "integer", "minimum": 64, "maximum": 2048, "x-order": 1},
                    "height": {"type": "integer", "minimum": 64, "maximum": 2048, "x-order": 2},
                    "num_outputs": {
                        "type": "integer",
                        "minimum": 1,
                        "maximum": 4,
                        "default": 1,
                        "x-order": 3,
                    },
                    "seed": {"type": "integer", "title": "Seed", "x-order": 4},
                    "guidance_scale": {
                        "type": "number",
                        "minimum": 0,
                        "maximum": 20,
                        "default": 7.5,
                        "x-order": 5,
                    },
                    "num_inference_steps": {
                        "type": "integer",
                        "minimum": 1,
                        "maximum": 100,
                        "default": 4,
                        "x-order": 6,
                    },
                    "output_format": {
                        "allOf": [{"$ref": "#/components/schemas/output_format"}],
                        "default": "png",
                        "x-order": 7,
                    },
                },
            },
            "Output": {
                "type": "array",
                "items": {"type": "string", "format": "uri"},
                "title": "Output",
            },
            "output_format": {
                "type": "string",
                "title": "output_format",
                "enum": OUTPUT_FORMATS,
                "description": "An enumeration.",
            },
        }
    },
}

_INPUT = Draft202012Validator({"$ref": "#/components/schemas/Input"} | OPENAPI_SCHEMA)


def invalid_fields(inputs: dict[str, Any]) -> Iterator[dict[str, str]]:
    """What the schema has against `inputs`, in the shape of Replicate's `invalid_fields`."""
    for error in _INPUT.iter_errors(inputs):
        field = ".".join(["input", *map(str, error.absolute_path)])
        yield {"type": str(error.validator), "field": field, "description": error.message}


def model_document(model: str, *, is_official: bool, schemas: bool) -> dict[str, Any]:
    """`GET /models/{owner}/{name}`; without schemas a model has no `latest_version`."""
    owner, name = model.split("/")
    version_id = hashlib.sha256(model.encode()).hexdigest()
    return {
        "url": f"https://replicate.com/{model}",
        "owner": owner,
        "name": name,
        "description": "A text-to-image model",
        "visibility": "public",
        "is_official": is_official,
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 1,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": version_document(version_id) if schemas else None,
    }


def version_document(version_id: str) -> dict[str, Any]:
    """`GET /models/{owner}/{name}/versions/{id}`."""
    return {
        "id": version_id,
        "created_at": "2025-01-01T00:00:00.000000Z",
        "cog_version": "0.9.0",
        "openapi_schema": OPENAPI_SCHEMA,
    }
