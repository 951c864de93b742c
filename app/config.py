"""Settings: every knob of the service, from the environment and `config.env`, checked at boot."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

TLS_OPTIONS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
MOCK_TOKEN = "mock_token_for_demo"  # noqa: S105 - the documented value that selects the mock


def _postgres_url(value: str) -> str:
    try:
        url = make_url(value)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError):
        backend = ""
    if backend not in ("postgresql", "postgres"):
        raise ValueError("must be a PostgreSQL URL: postgresql+asyncpg://user:password@host/name")
    if unknown := url.query.keys() - {"ssl", "sslmode", "host", "port"}:
        # Each is some driver's own word, and the other driver's error at the first connect.
        names = ", ".join(sorted(unknown))
        raise ValueError(f"must have no options but sslmode, host and port: not {names}")
    return value


def _redis_url(value: str) -> str:
    options = parse_qs(value.partition("?")[2])
    if not value.startswith(("redis://", "rediss://")) or not _has_host(value):
        raise ValueError("must be a Redis or Valkey URL: redis://host:6379/0")
    # Any other is an argument that some client does not know, at its first command.
    known = TLS_OPTIONS if value.startswith("rediss://") else ()
    if options.keys() - set(known):
        raise ValueError(f"must have no options but, with rediss://, {', '.join(TLS_OPTIONS)}")
    if options.get("ssl_cert_reqs", ["required"])[-1] not in ("required", "optional", "none"):
        raise ValueError("ssl_cert_reqs must be required, optional or none")
    return value


def _has_host(url: str) -> bool:
    """A password with a slash in it ends the address too early, and is taken for a port."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _http_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must be an http:// or https:// URL")
    return value.rstrip("/")


def _storage_url(value: str) -> str:
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9._/-]*)?|file:///[^?#]+", value):
        raise ValueError("must be s3://bucket, s3://bucket/prefix or file:///folder")
    return value


def _url_path(value: str) -> str:
    if not re.fullmatch(r"/[A-Za-z0-9._/-]*[A-Za-z0-9._-]", value):
        raise ValueError("must be a path that begins with / and does not end with it")
    return value


def _origin(value: str) -> str:
    if value.count("/") != 2:
        raise ValueError("must be an origin without a path: https://api.replicate.com")
    return value


def _cors_origins(value: str) -> str:
    for origin in _listed(value):
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
            raise ValueError(
                "must be origins as browsers write them, without a path or a slash at the end:"
                " https://www.example.com,http://localhost:3000"
            )
    return value


def _token(value: SecretStr) -> SecretStr:
    token = value.get_secret_value().strip()  # files and secret stores like to add a line's end
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("must be printable ASCII without spaces")
    return SecretStr(token)


def _webhook_secrets(value: SecretStr) -> SecretStr:
    for secret in _listed(value.get_secret_value()):
        if not re.fullmatch(r"whsec_[A-Za-z0-9+/]+={0,2}", secret):
            raise ValueError("must be whsec_ and then base64, several separated by commas")
    return value


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


PostgresUrl = Annotated[str, AfterValidator(_postgres_url)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
StorageUrl = Annotated[str, AfterValidator(_storage_url)]
UrlPath = Annotated[str, AfterValidator(_url_path)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
HttpOrigin = Annotated[HttpUrl, AfterValidator(_origin)]
CorsOrigins = Annotated[str, AfterValidator(_cors_origins)]
Token = Annotated[SecretStr, AfterValidator(_token)]
WebhookSecrets = Annotated[SecretStr, AfterValidator(_webhook_secrets)]
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value),
]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseSettings):
    """All settings; a field's name in capitals is its environment variable."""

    model_config = SettingsConfigDict(
        env_file=(".env", "config.env"), env_ignore_empty=True, extra="ignore"
    )

    # URLs hold passwords: `repr=False` keeps them out of any log or traceback.
    database_url: PostgresUrl = Field(
        "postgresql+asyncpg://fleek:fleek123@localhost:5432/fleek_media", repr=False
    )
    database_url_sync: PostgresUrl | None = Field(None, repr=False)
    database_pool_size: int = Field(10, ge=1, le=200)
    redis_url: RedisUrl = Field("redis://localhost:6379/0", repr=False)
    celery_broker_url: RedisUrl | None = Field(None, repr=False)
    celery_result_backend: RedisUrl | None = Field(None, repr=False)

    api_host: str = "0.0.0.0"  # noqa: S104 - the documented default: reachable, as in a container
    api_port: int = Field(8000, ge=1, le=65_535)
    api_debug: bool = False
    cors_origins: CorsOrigins = ""
    max_body_bytes: int = Field(1 << 20, ge=1024)

    storage_path: Path = Path("./storage/media")
    metadata_path: Path | None = None
    storage_url: StorageUrl | None = None
    aws_endpoint_url: HttpUrl | None = None
    aws_public_endpoint_url: HttpUrl | None = None
    aws_region: str = "us-east-1"
    aws_access_key_id: str | None = None
    aws_secret_access_key: SecretStr | None = None
    s3_serve: Literal["redirect", "stream"] = "redirect"
    presigned_url_seconds: int = Field(3600, ge=1, le=604_800)
    x_accel_prefix: UrlPath | None = None
    storage_base_url: HttpUrl = "http://localhost:8000/media"
    media_retention_days: int | None = Field(None, ge=1, le=36_500)
    metadata_retention_days: int | None = Field(None, ge=1, le=36_500)
    max_output_bytes: int = Field(100 << 20, ge=1024)
    max_output_pixels: int = Field(50_000_000, ge=1)
    decode_memory_bytes: int = Field(120 << 20, ge=32 << 20)
    store_original_format: bool = False
    download_concurrency: int = Field(8, ge=1, le=64)

    replicate_api_token: Token = SecretStr(MOCK_TOKEN)
    replicate_base_url: HttpOrigin = "https://api.replicate.com"
    replicate_timeout_seconds: Seconds = 15
    replicate_prefer_wait_seconds: int = Field(5, ge=0, le=60)
    replicate_creates_per_minute: float = Field(600, gt=0, le=100_000)
    replicate_calls_per_minute: float = Field(3000, gt=0, le=1_000_000)
    replicate_webhook_secret: WebhookSecrets = SecretStr("")
    public_base_url: HttpUrl | None = None
    replicate_mock_delay_min: float = Field(2, ge=0, le=3600)
    replicate_mock_delay_max: float = Field(10, ge=0, le=3600)
    replicate_mock_failure_rate: float = Field(0.1, ge=0, le=1)

    max_retry_attempts: int = Field(3, ge=0, le=100)
    retry_backoff_factor: float = Field(2, ge=1, le=60)
    retry_backoff_max_seconds: Seconds = 300
    reconcile_grace_seconds: float = Field(5, ge=0, le=600)
    reconcile_deadline_seconds: Seconds = 1800
    on_unknown_outcome: Literal["fail", "resubmit"] = "fail"
    queue_deadline_seconds: Seconds = 3600
    job_deadline_seconds: Seconds = 3600
    starting_deadline_seconds: float = Field(600, ge=5, le=86_400)
    running_deadline_seconds: float = Field(300, ge=5, le=86_400)
    download_deadline_seconds: Seconds = 120

    worker_concurrency: int = Field(1000, ge=1, le=10_000)
    worker_heartbeat_seconds: float = Field(3, gt=0, le=60)
    worker_lease_seconds: float = Field(15, gt=0, le=600)
    sweep_interval_seconds: float = Field(1, gt=0, le=60)
    poll_interval_seconds: float = Field(1, gt=0, le=60)

    flower_port: int = Field(5555, ge=1, le=65_535)
    log_level: LogLevel = "INFO"

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.replicate_mock_delay_min > self.replicate_mock_delay_max:
            raise ValueError("REPLICATE_MOCK_DELAY_MIN must not exceed REPLICATE_MOCK_DELAY_MAX")
        if self.worker_lease_seconds < 3 * self.worker_heartbeat_seconds:
            raise ValueError(
                "WORKER_LEASE_SECONDS must be at least 3 times WORKER_HEARTBEAT_SECONDS,"
                " or one late heartbeat takes a living worker's jobs away"
            )
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            raise ValueError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set together")
        return self

    @property
    def async_database_url(self) -> str:
        """`DATABASE_URL` for asyncpg, whatever driver the URL names."""
        return _with_driver(self.database_url, "postgresql+asyncpg")

    @property
    def sync_database_url(self) -> str:
        """`DATABASE_URL_SYNC` (or else `DATABASE_URL`) for psycopg 3: Alembic and the scripts."""
        return _with_driver(self.database_url_sync or self.database_url, "postgresql+psycopg")

    @property
    def broker_url(self) -> str:
        """`CELERY_BROKER_URL`, or else `REDIS_URL`."""
        return self.celery_broker_url or self.redis_url

    @property
    def is_storage_local(self) -> bool:
        """True when files are kept in folders, whichever setting names them."""
        return self.storage_url is None or self.storage_url.startswith("file:")

    @property
    def media_directory(self) -> Path:
        """The folder `media` below a `file://` `STORAGE_URL`, or else `STORAGE_PATH`."""
        folder = self._storage_folder
        return folder / "media" if folder else self.storage_path

    @property
    def metadata_directory(self) -> Path:
        """The folder `metadata` below a `file://` `STORAGE_URL`; or else `METADATA_PATH`, or
        else `metadata` beside `STORAGE_PATH`."""
        if self._storage_folder:
            return self._storage_folder / "metadata"
        return self.metadata_path or self.storage_path.parent / "metadata"

    @property
    def _storage_folder(self) -> Path | None:
        if self.storage_url is None or not self.is_storage_local:
            return None
        return Path(unquote(urlsplit(self.storage_url).path))

    @property
    def cors_origin_list(self) -> list[str]:
        """The comma-separated `CORS_ORIGINS` as a list; empty means no CORS headers."""
        return _listed(self.cors_origins)

    @property
    def webhook_secrets(self) -> list[str]:
        """The comma-separated `REPLICATE_WEBHOOK_SECRET`; empty means fetch the account's."""
        return _listed(self.replicate_webhook_secret.get_secret_value())

    @property
    def webhook_base_url(self) -> str | None:
        """Where Replicate reports to; it accepts https only, and the mock reports to nobody."""
        public = self.public_base_url or ""
        usable = public.startswith("https://") and not self.is_mock
        return f"{public}/api/v1/webhooks/replicate" if usable else None

    @property
    def is_mock(self) -> bool:
        """True when predictions come from the built-in mock instead of Replicate."""
        return self.replicate_api_token.get_secret_value() == MOCK_TOKEN


def _with_driver(url: str, driver: str) -> str:
    """Name the driver, and its own word for TLS: `ssl` for asyncpg, `sslmode` for psycopg."""
    ours, other = ("ssl", "sslmode") if driver.endswith("asyncpg") else ("sslmode", "ssl")
    parsed = make_url(url).set(drivername=driver)
    if other in parsed.query:
        parsed = parsed.update_query_dict({ours: parsed.query[other]}).difference_update_query(
            [other]
        )
    return parsed.render_as_string(hide_password=False)


@lru_cache
def get_settings() -> Settings:
    """Return the process's settings; end the process with one clear line per wrong value.

    The values themselves are not printed: one of them may be a password.
    """
    try:
        return Settings()
    except ValidationError as error:
        lines = [
            _explain(str(fault["loc"][0]) if fault["loc"] else "", fault["msg"])
            for fault in error.errors(include_input=False)
        ]
        raise SystemExit("Wrong configuration:\n" + "\n".join(lines)) from None


def _explain(name: str, message: str) -> str:
    text = message.removeprefix("Value error, ")
    return f"  {name.upper()}: {text}" if name else f"  {text}"
