"""A bucket of its own for one stack, and its files where the oracle looks for them."""

from uuid import uuid4

import obstore
from obstore.store import S3Store

from tests.faults.harness import Stack
from tests.s3_server import KEYS


def bucket_settings(endpoint_url: str) -> dict[str, str]:
    """Return the settings of a stack that keeps its files in the bucket, under a new prefix."""
    return {"STORAGE_URL": f"s3://media/{uuid4().hex}", "AWS_ENDPOINT_URL": endpoint_url, **KEYS}


def fetch_bucket(stack: Stack, endpoint_url: str) -> None:
    """Copy all that the stack has stored to its local folders."""
    store = S3Store.from_url(
        stack.settings["STORAGE_URL"],
        endpoint=endpoint_url,
        access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        client_options={"allow_http": True},
    )
    for batch in obstore.list(store):
        for found in batch:
            target = stack.media.parent / found["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(obstore.get(store, found["path"]).bytes()))
