"""Checks a job's parameters against its model's own input schema, before anything is paid."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import structlog
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import create
from referencing import Registry

from app.errors import InvalidInput

FetchSchema = Callable[[str], Awaitable[dict[str, Any] | None]]
Fault = tuple[tuple[str | int, ...], str]

_PLACE = ("body", "parameters")

KEEP_SECONDS = 3600.0
KEEP_MISS_SECONDS = 30.0
WAIT_SECONDS = 2.0
MAX_MODELS = 500
MAX_FETCHES = 50
MAX_STEPS = 5000
MAX_REPORTED = 20

log = structlog.get_logger(__name__)


class ParameterChecker:
    """The input schemas of the models in use, cached, and the check against them.

    `fetch` is `Provider.input_schema`. A schema is kept for an hour, and until there is another; a
    model without one, or a failed fetch, is asked for again after 30 seconds.
    """

    def __init__(self, fetch: FetchSchema, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._fetches: set[asyncio.Task[Validator | None]] = set()

    async def check(self, model_name: str, parameters: Mapping[str, Any]) -> list[str]:
        """Return warnings naming the parameters that the model does not know.

        Waits at most `WAIT_SECONDS` for the schema, the first time that the model is named;
        without one nothing is checked.
        Raises: InvalidInput - a value the model would refuse, or a required one that is missing.
        """
        if "prompt" in parameters:
            fault = (("body", "parameters", "prompt"), "must be given as the body's own `prompt`")
            raise InvalidInput("The parameters would overwrite the prompt.", [fault])
        schema = await self._schema(model_name, wait_again=False)
        if schema is None:
            return []
        faults = _faults(schema, parameters)
        if faults:
            raise InvalidInput(f"The model {model_name} would refuse the parameters.", faults)
        return _warnings(schema, parameters)

    async def knows(self, model_name: str, name: str, value: Any = None) -> bool:
        """Tell whether the model has a parameter of this name, and takes the value if one is given.

        False without a schema.
        """
        schema = await self._schema(model_name, wait_again=True)
        if schema is None or not isinstance(schema.schema, dict):
            return False
        if name not in (schema.schema.get("properties") or {}):
            return False
        return all(path[:3] != (*_PLACE, name) for path, _ in _faults(schema, {name: value}))

    async def aclose(self) -> None:
        """Stop the fetches that are under way."""
        for task in self._fetches:
            task.cancel()
        await asyncio.gather(*self._fetches, return_exceptions=True)

    async def _schema(self, model_name: str, *, wait_again: bool) -> Validator | None:
        """Return what is known; `wait_again` for a model that had no schema when last asked.

        A POST does not: with Redis or the provider away it would, every 30 seconds.
        """
        now = self._clock()
        entry = self._entries.get(model_name)
        if entry is None or entry.is_stale(now):
            entry = self._start(model_name, now, entry) or entry
        if entry is None:
            return None
        if entry.known is None and (entry.is_first or wait_again):
            # From the fetch's start: while one hangs, later requests do not wait for it again.
            left = entry.started_at + WAIT_SECONDS - now
            await asyncio.wait({entry.task}, timeout=max(left, 0))
        return entry.known

    def _start(self, model_name: str, now: float, last: "_Entry | None") -> "_Entry | None":
        """Begin one fetch that every request for the model shares, if not too many are open."""
        if len(self._fetches) >= MAX_FETCHES:
            return None
        self._entries.pop(model_name, None)
        if len(self._entries) >= MAX_MODELS:
            del self._entries[next(iter(self._entries))]
        task = asyncio.create_task(self._load(model_name), name=f"input-schema {model_name}")
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)
        entry = _Entry(task, now, is_first=last is None, before=last.known if last else None)
        self._entries[model_name] = entry
        return entry

    async def _load(self, model_name: str) -> Validator | None:
        try:
            schema = await self._fetch(model_name)
            return await asyncio.to_thread(_compile, schema) if schema else None
        except Exception as error:
            # Whatever is wrong with the provider or its schema, the model itself is the judge.
            log.warning("input_schema_missing", model=model_name, error=type(error).__name__)
            return None


@dataclass(frozen=True, slots=True)
class _Entry:
    task: asyncio.Task[Validator | None]
    started_at: float
    is_first: bool
    before: Validator | None

    @property
    def known(self) -> Validator | None:
        return (self.task.result() if self.task.done() else None) or self.before

    def is_stale(self, now: float) -> bool:
        if not self.task.done():
            return False
        keep = KEEP_SECONDS if self.task.result() is not None else KEEP_MISS_SECONDS
        return now >= self.started_at + keep


def _compile(schema: dict[str, Any]) -> Validator:
    """Raises: jsonschema.SchemaError."""
    schema = _without_dialects(schema)
    Draft202012Validator.check_schema(schema)
    # An empty registry: a `$ref` to an address is never fetched.
    return _SchemaCheck(schema, registry=Registry())


def _without_dialects(value: Any) -> Any:
    """Drop `$schema` and `$id`: an embedded one would bring back the keywords we leave out."""
    if isinstance(value, list):
        return [_without_dialects(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_dialects(item)
        for name, item in value.items()
        if name not in ("$schema", "$id") or not isinstance(item, str)
    }


def _faults(schema: Validator, parameters: Mapping[str, Any]) -> list[Fault]:
    steps = _steps.set(count())
    try:
        # The prompt is the body's own; a stand-in keeps "required" content.
        errors = schema.iter_errors({"prompt": "", **parameters})
        ours = (error for error in errors if "prompt" not in list(error.absolute_path)[:1])
        return [_fault(error) for error in islice(ours, MAX_REPORTED)]
    except Exception as error:
        # An unresolvable reference, endless recursion, too many steps: let the provider judge.
        log.warning("parameter_check_given_up", error=type(error).__name__)
        return []
    finally:
        _steps.reset(steps)


def _fault(error: ValidationError) -> Fault:
    describe = _MESSAGES.get(str(error.validator), lambda _: "does not fit the model's schema")
    return (*_PLACE, *error.absolute_path), describe(error.validator_value)[:300]


def _warnings(schema: Validator, parameters: Mapping[str, Any]) -> list[str]:
    known = schema.schema.get("properties") if isinstance(schema.schema, dict) else None
    if not isinstance(known, dict):
        return []
    unknown = [name for name in parameters if name not in known]
    warnings = [
        f"The model does not know the parameter '{name[:100]}'; it is passed on as given."
        for name in unknown[:MAX_REPORTED]
    ]
    if len(unknown) > MAX_REPORTED:
        warnings.append(f"So it is with {len(unknown) - MAX_REPORTED} more parameters.")
    return warnings


_steps: ContextVar["count[int]"] = ContextVar("steps")

Keyword = Callable[[Any, Any, Any, Any], Any]


def _bounded(keyword: Keyword) -> Keyword:
    """Let null pass (`nullable` is OpenAPI's word, unknown to JSON Schema), and count the work."""

    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        if instance is None:
            return ()
        if next(_steps.get()) >= MAX_STEPS:
            raise TimeoutError("too many steps")
        return keyword(validator, value, instance, schema)

    return check


def _required(validator: Any, names: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """As JSON Schema has it, but each error's path is the missing name."""
    del validator, schema
    if isinstance(instance, dict):
        for name in names:
            if name not in instance:
                yield ValidationError("missing", path=[name])


# What a wrong value usually breaks. Regular expressions, uniqueness and the like are left to the
# provider: their cost on a hostile value has no bound.
_KEYWORDS = (
    *("$ref", "allOf", "anyOf", "oneOf", "properties", "items", "type", "enum", "const"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "minItems", "maxItems"),
)

_SchemaCheck = create(
    meta_schema=Draft202012Validator.META_SCHEMA,
    validators={name: _bounded(Draft202012Validator.VALIDATORS[name]) for name in _KEYWORDS}
    | {"required": _required},
    type_checker=Draft202012Validator.TYPE_CHECKER,
)


def _listed(values: Any) -> str:
    values = values if isinstance(values, list) else [values]
    return ", ".join(json.dumps(value) for value in values[:MAX_REPORTED])


# Our own words: the library's quote the client's value, however long.
_MESSAGES: dict[str, Callable[[Any], str]] = {
    "required": lambda _: "is required by the model",
    "type": lambda value: f"must be of type {_listed(value)}".replace('"', ""),
    "enum": lambda value: f"must be one of {_listed(value)}",
    "const": lambda value: f"must be {_listed(value)}",
    "minimum": lambda value: f"must be at least {value}",
    "maximum": lambda value: f"must be at most {value}",
    "exclusiveMinimum": lambda value: f"must be more than {value}",
    "exclusiveMaximum": lambda value: f"must be less than {value}",
    "multipleOf": lambda value: f"must be a multiple of {value}",
    "minLength": lambda value: f"must have at least {value} characters",
    "maxLength": lambda value: f"must have at most {value} characters",
    "minItems": lambda value: f"must have at least {value} items",
    "maxItems": lambda value: f"must have at most {value} items",
}
