"""The settings: where they come from, what is refused, and that config.env.example tells it all."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from app.config import MOCK_TOKEN, Settings, get_settings

EXAMPLE = Path(__file__).parents[2] / "config.env.example"
SETTING = re.compile(r"(?P<comment># )?(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)")

DOCUMENTED = {
    "DATABASE_URL": "postgresql+asyncpg://fleek:fleek123@localhost:5432/fleek_media",
    "REDIS_URL": "redis://localhost:6379/0",
    "CELERY_RESULT_BACKEND": "redis://localhost:6379/0",
    "API_HOST": "0.0.0.0",
    "API_PORT": "8000",
    "API_DEBUG": "true",
    "STORAGE_PATH": "./storage/media",
    "STORAGE_BASE_URL": "http://localhost:8000/media",
    "REPLICATE_API_TOKEN": "mock_token_for_demo",
    "REPLICATE_MOCK_DELAY_MIN": "2",
    "REPLICATE_MOCK_DELAY_MAX": "10",
    "REPLICATE_MOCK_FAILURE_RATE": "0.1",
    "MAX_RETRY_ATTEMPTS": "3",
    "RETRY_BACKOFF_FACTOR": "2",
    "LOG_LEVEL": "INFO",
}
# Where the documented value is not what the service does without it: a server must not restart on
# changes, nor name a result backend that nothing uses, unless somebody says so.
DIFFERENT = {"CELERY_RESULT_BACKEND", "API_DEBUG"}
# Settings without a value of their own follow another one, in the way these properties tell.
FOLLOWING = {
    "DATABASE_URL_SYNC": "sync_database_url",
    "CELERY_BROKER_URL": "broker_url",
    "METADATA_PATH": "metadata_directory",
}
# Whatever these say can be right.
FREE = {
    *("API_HOST", "STORAGE_PATH", "METADATA_PATH"),
    *("AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}

POSTGRES = "must be a PostgreSQL URL: postgresql+asyncpg://user:password@host/name"
REDIS = "must be a Redis or Valkey URL: redis://host:6379/0"
HTTP = "must be an http:// or https:// URL"
ORIGINS = "must be origins as browsers write them"
SECRETS = "must be whsec_ and then base64"
STORAGE = "must be s3://bucket, s3://bucket/prefix or file:///folder"
POSITIVE = "greater than 0"
DAY = "less than or equal to 86400"
WRONG = [
    ("DATABASE_URL", "mysql://fleek:s3cret@localhost/fleek_media", POSTGRES),
    ("DATABASE_URL", "s3cret", POSTGRES),
    ("DATABASE_URL", "postgresql://fleek:p@ss:s3cret@localhost/fleek_media", POSTGRES),
    ("DATABASE_URL", "postgresql://fleek@localhost:s3cret/fleek_media", POSTGRES),
    ("DATABASE_URL_SYNC", "sqlite:///s3cret", POSTGRES),
    (
        "DATABASE_URL",
        "postgresql://db/media?sslmode=require&connect_timeout=s3cret",
        "must have no options but sslmode, host and port: not connect_timeout",
    ),
    ("DATABASE_POOL_SIZE", "0", "greater than or equal to 1"),
    ("DATABASE_POOL_SIZE", "201", "less than or equal to 200"),
    ("REDIS_URL", "http://:s3cret@localhost", REDIS),
    ("REDIS_URL", "redis://:s3cret/word@localhost:6379/0", REDIS),
    ("REDIS_URL", "redis://localhost:s3cret/0", REDIS),
    ("REDIS_URL", "redis://localhost/0?ssl_cert_reqs=none", "must have no options but"),
    ("CELERY_BROKER_URL", "rediss://localhost/0?s3cret=1", "must have no options but"),
    ("REPLICATE_API_TOKEN", "r8_s3cret word", "must be printable ASCII"),
    ("REPLICATE_API_TOKEN", "r8_s3cr\u00e9t", "must be printable ASCII"),
    ("CELERY_BROKER_URL", "amqp://guest:s3cret@localhost", REDIS),
    ("CELERY_RESULT_BACKEND", "db+postgresql://fleek:s3cret@localhost", REDIS),
    ("API_PORT", "65536", "less than or equal to 65535"),
    ("API_PORT", "http", "valid integer"),
    ("API_DEBUG", "perhaps", "valid boolean"),
    ("REDIS_URL", "rediss://h/0?ssl_cert_reqs=CERT_NONE", "must be required, optional or none"),
    ("CORS_ORIGINS", "https://a.example/", ORIGINS),
    ("CORS_ORIGINS", "https://b.example, a.example", ORIGINS),
    ("CORS_ORIGINS", "https://A.example", ORIGINS),
    ("MAX_BODY_BYTES", "1023", "greater than or equal to 1024"),
    ("STORAGE_BASE_URL", "ftp://u:s3cret@localhost", HTTP),
    ("MAX_OUTPUT_BYTES", "1023", "greater than or equal to 1024"),
    ("MAX_OUTPUT_PIXELS", "0", "greater than or equal to 1"),
    ("DECODE_MEMORY_BYTES", "33554431", "greater than or equal to 33554432"),
    ("STORE_ORIGINAL_FORMAT", "perhaps", "valid boolean"),
    ("DOWNLOAD_CONCURRENCY", "65", "less than or equal to 64"),
    ("STORAGE_URL", "gs://bucket", STORAGE),
    ("STORAGE_URL", "file://srv/media", STORAGE),
    ("STORAGE_URL", "file:srv", STORAGE),
    ("STORAGE_URL", "file:///", STORAGE),
    ("STORAGE_URL", "/srv/media", STORAGE),
    ("AWS_ENDPOINT_URL", "localhost:8333", HTTP),
    ("AWS_PUBLIC_ENDPOINT_URL", "localhost:8333", HTTP),
    ("S3_SERVE", "proxy", "'redirect' or 'stream'"),
    ("PRESIGNED_URL_SECONDS", "0", "greater than or equal to 1"),
    ("PRESIGNED_URL_SECONDS", "604801", "less than or equal to 604800"),
    ("X_ACCEL_PREFIX", "internal-media", "must be a path that begins with /"),
    ("X_ACCEL_PREFIX", "/internal-media/", "must be a path that begins with /"),
    ("MEDIA_RETENTION_DAYS", "0", "greater than or equal to 1"),
    ("METADATA_RETENTION_DAYS", "36501", "less than or equal to 36500"),
    ("REPLICATE_BASE_URL", "api.replicate.com?token=s3cret", HTTP),
    ("REPLICATE_BASE_URL", "https://api.replicate.com/v1", "must be an origin without a path"),
    ("REPLICATE_TIMEOUT_SECONDS", "0", POSITIVE),
    ("REPLICATE_PREFER_WAIT_SECONDS", "61", "less than or equal to 60"),
    ("REPLICATE_MOCK_DELAY_MIN", "-1", "greater than or equal to 0"),
    ("REPLICATE_MOCK_DELAY_MAX", "3601", "less than or equal to 3600"),
    ("REPLICATE_MOCK_FAILURE_RATE", "1.1", "less than or equal to 1"),
    ("MAX_RETRY_ATTEMPTS", "-1", "greater than or equal to 0"),
    ("RETRY_BACKOFF_FACTOR", "0.5", "greater than or equal to 1"),
    ("RETRY_BACKOFF_MAX_SECONDS", "86401", DAY),
    ("RECONCILE_GRACE_SECONDS", "601", "less than or equal to 600"),
    ("RECONCILE_DEADLINE_SECONDS", "0", POSITIVE),
    ("ON_UNKNOWN_OUTCOME", "hope", "'fail' or 'resubmit'"),
    ("JOB_DEADLINE_SECONDS", "86401", DAY),
    ("QUEUE_DEADLINE_SECONDS", "0", "greater than 0"),
    ("PUBLIC_BASE_URL", "media.example.com", "must be an http:// or https:// URL"),
    ("REPLICATE_WEBHOOK_SECRET", "s3cret", SECRETS),
    ("REPLICATE_WEBHOOK_SECRET", "whsec_c2VjcmV0,whsec_s3cret-", SECRETS),
    ("REPLICATE_CREATES_PER_MINUTE", "0", "greater than 0"),
    ("REPLICATE_CALLS_PER_MINUTE", "-1", "greater than 0"),
    ("STARTING_DEADLINE_SECONDS", "4", "greater than or equal to 5"),
    ("RUNNING_DEADLINE_SECONDS", "4", "greater than or equal to 5"),
    ("DOWNLOAD_DEADLINE_SECONDS", "0", POSITIVE),
    ("WORKER_CONCURRENCY", "10001", "less than or equal to 10000"),
    ("WORKER_HEARTBEAT_SECONDS", "0", POSITIVE),
    ("WORKER_LEASE_SECONDS", "601", "less than or equal to 600"),
    ("SWEEP_INTERVAL_SECONDS", "61", "less than or equal to 60"),
    ("POLL_INTERVAL_SECONDS", "0", POSITIVE),
    ("FLOWER_PORT", "0", "greater than or equal to 1"),
    ("LOG_LEVEL", "verbose", "'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'"),
]


class Entry(NamedTuple):
    """One setting of config.env.example, and the line above it."""

    value: str
    is_set: bool
    above: str


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without config.env, and none of our variables in the environment."""
    for name in _names():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()


@pytest.fixture
def example() -> dict[str, Entry]:
    """The settings of config.env.example."""
    lines = EXAMPLE.read_text().splitlines()
    entries: dict[str, Entry] = {}
    for above, line in zip(["", *lines], lines, strict=False):
        found = SETTING.fullmatch(line)
        if found:
            assert found["name"] not in entries
            entries[found["name"]] = Entry(found["value"], not found["comment"], above)
    return entries


class TestExample:
    def test_names_every_setting_and_no_other(self, example: dict[str, Entry]) -> None:
        assert set(example) == _names()

    def test_has_the_documented_values(self, example: dict[str, Entry]) -> None:
        assert {name: entry.value for name, entry in example.items() if entry.is_set} == DOCUMENTED

    def test_shows_the_defaults(
        self, example: dict[str, Entry], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        defaults = Settings()
        for name, entry in example.items():
            monkeypatch.setenv(name, entry.value)
        shown = Settings()

        different = {
            name for name in example if _effective(defaults, name) != _effective(shown, name)
        }

        assert different == DIFFERENT

    def test_explains_each_setting_in_one_line(self, example: dict[str, Entry]) -> None:
        explained = [
            name
            for name, entry in example.items()
            if entry.above.startswith("# ") and not SETTING.fullmatch(entry.above)
        ]

        assert explained == list(example)

    def test_is_a_working_config_env(self, example: dict[str, Entry]) -> None:
        Path("config.env").write_text(EXAMPLE.read_text())

        assert get_settings().model_fields_set == {name.lower() for name in DOCUMENTED}


class TestSources:
    def test_config_env_is_read(self) -> None:
        Path("config.env").write_text("API_PORT=9001\n# API_PORT=9002\n")

        assert get_settings().api_port == 9001

    def test_environment_beats_config_env(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Path("config.env").write_text("API_PORT=9001\nLOG_LEVEL=ERROR\n")
        monkeypatch.setenv("API_PORT", "9002")

        assert (get_settings().api_port, get_settings().log_level) == (9002, "ERROR")

    def test_config_env_beats_dot_env(self) -> None:
        Path(".env").write_text("API_PORT=9001\nLOG_LEVEL=ERROR\n")
        Path("config.env").write_text("API_PORT=9002\n")

        assert (get_settings().api_port, get_settings().log_level) == (9002, "ERROR")

    def test_an_empty_variable_is_no_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CELERY_RESULT_BACKEND", "")
        monkeypatch.setenv("API_PORT", "")

        assert get_settings() == Settings()

    def test_variables_of_others_are_ignored(self) -> None:
        Path("config.env").write_text("POSTGRES_PASSWORD=fleek123\n")

        assert get_settings() == Settings()


class TestWrongValues:
    @pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
    def test_stop_the_start_with_the_name_and_what_it_may_be(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
    ) -> None:
        monkeypatch.setenv(name, value)

        heading, line = _refusal().splitlines()

        assert heading == "Wrong configuration:"
        assert line.startswith(f"  {name}: ")
        assert allowed in line
        assert "s3cret" not in line

    def test_are_known_for_every_setting(self) -> None:
        assert {name for name, _, _ in WRONG} == _names() - FREE

    def test_are_all_named_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("API_PORT", "0")
        Path("config.env").write_text("MAX_RETRY_ATTEMPTS=many\n")

        refusal = _refusal()

        assert "API_PORT" in refusal
        assert "MAX_RETRY_ATTEMPTS" in refusal

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            (
                {"REPLICATE_MOCK_DELAY_MIN": "3", "REPLICATE_MOCK_DELAY_MAX": "2"},
                "REPLICATE_MOCK_DELAY_MIN must not exceed REPLICATE_MOCK_DELAY_MAX",
            ),
            (
                {"WORKER_HEARTBEAT_SECONDS": "5", "WORKER_LEASE_SECONDS": "14.9"},
                "WORKER_LEASE_SECONDS must be at least 3 times WORKER_HEARTBEAT_SECONDS",
            ),
            (
                {"AWS_ACCESS_KEY_ID": "fleek"},
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set together",
            ),
            (
                {"AWS_SECRET_ACCESS_KEY": "change-me"},
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set together",
            ),
        ],
    )
    def test_that_contradict_each_other_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], named: str
    ) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

        assert named in _refusal()


class TestSecrets:
    def test_are_in_no_printed_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_s3cret")
        monkeypatch.setenv("DATABASE_URL", "postgresql://fleek:s3cret@localhost/fleek_media")
        monkeypatch.setenv("DATABASE_URL_SYNC", "postgresql://fleek:s3cret@localhost/fleek_media")
        for name in ("REDIS_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
            monkeypatch.setenv(name, "redis://:s3cret@localhost:6379/0")

        assert "s3cret" not in f"{get_settings()!r} {get_settings()}"


class TestValues:
    def test_the_log_level_may_be_in_lower_case(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOG_LEVEL", "warning")

        assert get_settings().log_level == "WARNING"

    @pytest.mark.parametrize(
        "scheme",
        [
            *("postgres", "postgresql", "postgresql+asyncpg"),
            *("postgresql+psycopg", "postgresql+psycopg2"),
        ],
    )
    def test_any_postgresql_url_serves_both_drivers(self, scheme: str) -> None:
        settings = Settings(database_url=f"{scheme}://fleek:p%40ss@db:6432/media")

        rest = "://fleek:p%40ss@db:6432/media"
        assert settings.async_database_url == f"postgresql+asyncpg{rest}"
        assert settings.sync_database_url == f"postgresql+psycopg{rest}"

    def test_database_url_sync_is_for_the_synchronous_driver_only(self) -> None:
        settings = Settings(
            database_url="postgresql+asyncpg://a@pool/media",
            database_url_sync="postgres://b@primary/media",
        )

        assert settings.async_database_url == "postgresql+asyncpg://a@pool/media"
        assert settings.sync_database_url == "postgresql+psycopg://b@primary/media"

    def test_the_broker_is_redis_url_unless_it_is_named(self) -> None:
        named = Settings(redis_url="redis://a/0", celery_broker_url="rediss://b/1")

        assert Settings(redis_url="redis://a/0").broker_url == "redis://a/0"
        assert named.broker_url == "rediss://b/1"

    def test_the_metadata_lies_beside_the_media_unless_it_is_named(self) -> None:
        named = Settings(storage_path=Path("/data/media"), metadata_path=Path("/other"))

        assert Settings(storage_path=Path("/data/media")).metadata_directory == Path(
            "/data/metadata"
        )
        assert named.metadata_directory == Path("/other")

    def test_a_storage_url_of_a_folder_replaces_both_paths(self) -> None:
        settings = Settings(
            storage_url="file:///srv/our%20files",
            storage_path=Path("/data/media"),
            metadata_path=Path("/other"),
        )

        assert settings.media_directory == Path("/srv/our files/media")
        assert settings.metadata_directory == Path("/srv/our files/metadata")

    def test_only_a_bucket_is_not_local(self) -> None:
        assert Settings().is_storage_local
        assert Settings(storage_url="file:///srv").is_storage_local
        assert not Settings(storage_url="s3://bucket").is_storage_local

    def test_base_urls_end_without_a_slash(self) -> None:
        settings = Settings(storage_base_url="https://cdn.example/media/")

        assert settings.storage_base_url == "https://cdn.example/media"

    def test_cors_origins_are_separated_by_commas(self) -> None:
        settings = Settings(
            cors_origins="https://a.example, http://localhost:3000,capacitor://localhost,"
        )

        assert settings.cors_origin_list == [
            "https://a.example",
            "http://localhost:3000",
            "capacitor://localhost",
        ]
        assert Settings().cors_origin_list == []

    def test_any_origin_may_be_allowed(self) -> None:
        assert Settings(cors_origins="*").cors_origin_list == ["*"]

    def test_webhook_secrets_are_separated_by_commas(self) -> None:
        settings = Settings(replicate_webhook_secret="whsec_c2VjcmV0, whsec_c2VjcmV0cw==")

        assert settings.webhook_secrets == ["whsec_c2VjcmV0", "whsec_c2VjcmV0cw=="]

    @pytest.mark.parametrize(("token", "is_mock"), [(MOCK_TOKEN, True), ("r8_real", False)])
    def test_the_token_chooses_the_provider(self, token: str, is_mock: bool) -> None:
        assert Settings(replicate_api_token=token).is_mock is is_mock


def _names() -> set[str]:
    return {name.upper() for name in Settings.model_fields}


def _effective(settings: Settings, name: str) -> object:
    return getattr(settings, FOLLOWING.get(name, name.lower()))


def _refusal() -> str:
    with pytest.raises(SystemExit) as refused:
        get_settings()
    return str(refused.value)
