"""The bodies of requests and answers, as the OpenAPI document shows them."""

import re
from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from app.api.json_values import check_storable, check_text, parse_object
from app.jobs.models import AttemptState, Charged, Job, JobStatus, Output
from app.jobs.repository import Outputs

DEFAULT_MODEL = "black-forest-labs/flux-schnell"
MAX_PROMPT_CHARACTERS = 10_000
MAX_LIMIT = 100
MAX_OFFSET = 100_000

_PART = "[A-Za-z0-9][A-Za-z0-9._-]*"
MODEL_NAME_PATTERN = f"^{_PART}/{_PART}(:{_PART})?$"


def _prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return check_text(text)


def _model_name(text: str) -> str:
    if re.fullmatch(MODEL_NAME_PATTERN[1:-1], text) is None:
        raise ValueError("must be owner/name or owner/name:version")
    return text


def _offset(value: int) -> int:
    if value > MAX_OFFSET:
        raise ValueError(f"must be at most {MAX_OFFSET}: use `cursor` to go beyond")
    return value


PARAMETERS_SCHEMA = {
    "anyOf": [
        {"type": "object", "additionalProperties": True},
        {"type": "string", "contentMediaType": "application/json"},
        {"type": "null"},
    ],
}


class GenerateRequest(BaseModel):
    """What to generate."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "prompt": "A serene mountain landscape at sunset",
                    "model_name": DEFAULT_MODEL,
                    "parameters": {"width": 1024, "height": 1024, "seed": 7},
                }
            ]
        },
    )

    prompt: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_PROMPT_CHARACTERS,
            description="What the picture shows; kept exactly as given.",
            json_schema_extra={"pattern": r"\S"},
        ),
        AfterValidator(_prompt),
    ]
    model_name: Annotated[
        str,
        Field(
            max_length=200,
            description="A model of the provider: `owner/name` or `owner/name:version`.",
            json_schema_extra={"pattern": MODEL_NAME_PATTERN},
        ),
        AfterValidator(_model_name),
    ] = DEFAULT_MODEL
    parameters: Annotated[
        dict[str, Any],
        BeforeValidator(parse_object, json_schema_input_type=Any),
        AfterValidator(check_storable),
        Field(
            description="The model's further inputs, passed on unchanged: a JSON object, or a"
            " string that holds one. They are checked against the model's input schema.",
            json_schema_extra=PARAMETERS_SCHEMA,
        ),
    ] = Field(default_factory=dict)


class JobsQuery(BaseModel):
    """Which page of which jobs."""

    model_config = ConfigDict(extra="forbid")

    status_filter: JobStatus | None = Field(None, description="Only jobs of this status.")
    limit: int = Field(
        20,
        ge=1,
        le=MAX_LIMIT,
        description="How many jobs a page has at most; fewer where they are megabytes.",
    )
    offset: Annotated[int, AfterValidator(_offset)] = Field(
        0,
        ge=0,
        description=f"How many jobs to skip, up to {MAX_OFFSET}: as many as were shown so far."
        " `cursor` goes beyond.",
        json_schema_extra={"maximum": MAX_OFFSET},
    )
    cursor: str | None = Field(
        None,
        max_length=64,
        description="Where the page begins: from the `Link` header of the page before."
        " As fast on any page as on the first. Not together with `offset`.",
    )


_ID = "01939f3e-7c1a-7d52-9b1e-3f6a5d0c2b11"
_URL = f"http://localhost:8000/media/{_ID}.png"
JOB_EXAMPLE: dict[str, Any] = {
    "id": _ID,
    "prompt": "A serene mountain landscape at sunset",
    "model_name": DEFAULT_MODEL,
    "parameters": {"width": 1024, "height": 1024, "seed": 7},
    "status": "completed",
    "created_at": "2026-01-01T12:00:00.000000Z",
    "updated_at": "2026-01-01T12:00:06.500000Z",
    "started_at": "2026-01-01T12:00:00.050000Z",
    "completed_at": "2026-01-01T12:00:06.500000Z",
    "retry_count": 0,
    "next_attempt_at": None,
    "error_code": None,
    "error_message": None,
    "result_url": _URL,
    "file_size": 1245760,
    "external_job_id": "uvb7ynit4bhpjds3vn4bx7npeq",
    "outputs": [
        {
            "index": 0,
            "url": _URL,
            "media_type": "image/png",
            "size_bytes": 1245760,
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "width": 1024,
            "height": 1024,
            "duration_seconds": None,
            "content_policy_suspected": False,
            "deleted_at": None,
        }
    ],
}
CREATED_JOB_EXAMPLE: dict[str, Any] = {
    **JOB_EXAMPLE,
    **{"status": "pending", "updated_at": JOB_EXAMPLE["created_at"], "outputs": []},
    **dict.fromkeys(
        ("started_at", "completed_at", "result_url", "file_size", "external_job_id"), None
    ),
    "warnings": [],
}


class OutputView(BaseModel):
    """One stored file of a job."""

    index: int
    url: str | None = Field(description="Null when the file is deleted.")
    media_type: str
    size_bytes: int
    sha256: str
    width: int | None
    height: int | None
    duration_seconds: float | None = Field(description="How long it plays, where its file says so.")
    content_policy_suspected: bool = Field(
        description="All pixels have one colour: what some models make instead of refusing."
    )
    deleted_at: datetime | None = Field(description="Since when: its retention time is over.")


class JobView(BaseModel):
    """A job as of now."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE]})

    id: UUID
    prompt: str
    model_name: str
    parameters: dict[str, Any]
    status: JobStatus
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    completed_at: datetime | None = Field(description="When it ended, in whichever way.")
    retry_count: int = Field(
        description="Retries counted against `MAX_RETRY_ATTEMPTS`; to wait for the provider's rate,"
        " or for the end of an outage, costs none."
    )
    next_attempt_at: datetime | None = Field(
        description="When the job is tried again; null unless it waits for that."
    )
    error_code: str | None = Field(
        description="Why it failed, or why its last try did not get on: docs/errors.md tells what"
        " each code means, and whether anything was paid."
    )
    error_message: str | None = Field(description="The last error; null when there is none.")
    result_url: str | None = Field(
        description="The first output; null until completed, and again when it is deleted."
    )
    file_size: int | None = Field(description="The first output's size in bytes.")
    external_job_id: str | None = Field(description="The provider's prediction id.")
    outputs: list[OutputView]

    @classmethod
    def of(cls, job: Job, outputs: Outputs | None, base_url: str, **more: Any) -> Self:
        """Show a job; outputs are found at `{base_url}/{name}`."""
        outputs = outputs or Outputs()
        views = [_output_view(output, base_url, outputs.deleted_at) for output in outputs]
        first = views[0] if views else None
        return cls(
            id=job.id,
            prompt=job.prompt,
            model_name=job.model_name,
            parameters=job.parameters,
            status=job.status,
            created_at=job.created_at,
            updated_at=job.updated_at,
            started_at=job.started_at,
            completed_at=job.completed_at,
            retry_count=job.retry_count,
            next_attempt_at=job.next_attempt_at,
            error_code=job.error_code,
            error_message=job.error_message,
            result_url=first.url if first else None,
            file_size=first.size_bytes if first else None,
            external_job_id=job.external_job_id,
            outputs=views,
            **more,
        )


class CreatedJobView(JobView):
    """A job that was just accepted."""

    model_config = ConfigDict(json_schema_extra={"examples": [CREATED_JOB_EXAMPLE]})

    warnings: list[str] = Field(
        description="What may be a mistake, such as a parameter the model does not know."
    )


class AttemptView(BaseModel):
    """One create call at the provider: what may have been paid, and what came of it."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID = Field(description="What a webhook's address, and the log, call it by.")
    number: int
    provider: str
    model_name: str
    input: dict[str, Any] = Field(description="Exactly what was sent.")
    state: AttemptState
    prediction_id: str | None
    version: str | None
    outcome: str | None = Field(description="How it ended; null while it is open.")
    error_class: str | None
    error_message: str | None
    charged: Charged
    predict_time_seconds: float | None
    created_at: datetime = Field(description="The intent, committed before the call.")
    submitted_at: datetime | None = Field(description="When the prediction's id was known.")
    settled_at: datetime | None


def _output_view(output: Output, base_url: str, deleted_at: datetime | None) -> OutputView:
    return OutputView(
        index=output.index,
        url=None if deleted_at else f"{base_url}/{output.name}",
        media_type=output.media_type,
        size_bytes=output.size_bytes,
        sha256=output.sha256,
        width=output.width,
        height=output.height,
        duration_seconds=output.duration_seconds,
        content_policy_suspected=output.content_policy_suspected,
        deleted_at=deleted_at,
    )
