"""The check of parameters against a model's input schema, and the cache of schemas."""

import asyncio
import time
from typing import Any

import pytest

from app.errors import FailureClass, InvalidInput, ProviderError
from app.jobs import parameters
from app.jobs.parameters import ParameterChecker

# As Replicate serves a model's `Input` (OpenAPI 3.0 words included), with its references inside.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Input",
    "required": ["prompt", "image"],
    "properties": {
        "prompt": {"type": "string", "title": "Prompt", "x-order": 0},
        "image": {"type": "string", "format": "uri", "x-order": 1},
        "width": {"type": "integer", "minimum": 256, "maximum": 1440, "default": 1024},
        "strength": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "seed": {"type": "integer", "nullable": True},
        "fast": {"type": "boolean"},
        "scheduler": {
            "allOf": [{"$ref": "#/components/schemas/scheduler"}],
            "default": "K_EULER",
            "description": "a sibling of allOf",
        },
        "loras": {"type": "array", "items": {"type": "string", "minLength": 2}, "maxItems": 3},
        "size": {"anyOf": [{"type": "integer"}, {"enum": ["auto"]}]},
        "mask": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
    "components": {
        "schemas": {"scheduler": {"type": "string", "enum": ["DDIM", "K_EULER"], "title": "s"}}
    },
}


class Schemas:
    """Counts what is fetched; serves one schema, or fails, or hangs."""

    def __init__(self, answer: Any = SCHEMA) -> None:
        self.answer = answer
        self.fetched: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, model_name: str) -> dict[str, Any] | None:
        self.fetched.append(model_name)
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        found: dict[str, Any] | None = self.answer
        return found


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def faults(given: dict[str, Any], schema: Any = SCHEMA) -> dict[str, str]:
    """The path and message of every fault, without `body.parameters.`."""
    checker = ParameterChecker(Schemas(schema).fetch)
    try:
        await checker.check("a/b", {"image": "https://x.test/y", **given})
    except InvalidInput as error:
        found = error.errors
    else:
        return {}
    assert all(path[:2] == ("body", "parameters") for path, _ in found)
    return {".".join(map(str, path[2:])): message for path, message in found}


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"width": "512"}, "width", "must be of type integer"),
        ({"width": True}, "width", "must be of type integer"),
        ({"width": 512.5}, "width", "must be of type integer"),
        ({"width": 100}, "width", "must be at least 256"),
        ({"width": 5000}, "width", "must be at most 1440"),
        ({"strength": 0}, "strength", "must be more than 0"),
        ({"strength": 1.01}, "strength", "must be at most 1"),
        ({"fast": "yes"}, "fast", "must be of type boolean"),
        ({"scheduler": "LCM"}, "scheduler", 'must be one of "DDIM", "K_EULER"'),
        ({"scheduler": 1}, "scheduler", None),
        ({"loras": "one"}, "loras", "must be of type array"),
        ({"loras": ["aa", "b"]}, "loras.1", "must have at least 2 characters"),
        ({"loras": ["aa"] * 4}, "loras", "must have at most 3 items"),
        ({"size": "big"}, "size", "does not fit the model's schema"),
        ({"mask": {"x": "1"}}, "mask.x", "must be of type integer"),
        ({"mask": {}}, "mask.x", "is required by the model"),
        ({"mask": []}, "mask", "must be of type object"),
    ],
)
async def test_wrong_values(given: dict[str, Any], path: str, message: str | None) -> None:
    found = await faults(given)
    assert list(found) == [path]
    assert message is None or found[path] == message


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"width": 256},
        {"width": 1440},
        {"width": 512.0},
        {"strength": 1},
        {"seed": None},
        {"width": None, "scheduler": None, "loras": None, "mask": None, "size": None},
        {"loras": ["aa", None]},
        {"scheduler": "DDIM", "size": "auto"},
        {"unknown": {"any": "thing"}},
    ],
)
async def test_good_values(given: dict[str, Any]) -> None:
    assert await faults(given) == {}


async def test_a_missing_required_parameter() -> None:
    checker = ParameterChecker(Schemas().fetch)
    with pytest.raises(InvalidInput) as caught:
        await checker.check("a/b", {"width": 512})
    assert caught.value.errors == [(("body", "parameters", "image"), "is required by the model")]


async def test_the_prompt_is_the_bodys_own() -> None:
    schemas = Schemas()
    with pytest.raises(InvalidInput) as caught:
        await ParameterChecker(schemas.fetch).check("a/b", {"prompt": "x"})
    assert caught.value.errors[0][0] == ("body", "parameters", "prompt")
    assert schemas.fetched == []


async def test_a_required_prompt_inside_a_reference_is_not_asked_for() -> None:
    schema = {
        "allOf": [{"$ref": "#/components/schemas/Input"}],
        "components": {"schemas": {"Input": {"required": ["prompt", "image"]}}},
    }
    assert await faults({}, schema) == {}


async def test_unknown_names_are_warnings() -> None:
    checker = ParameterChecker(Schemas().fetch)
    warnings = await checker.check("a/b", {"image": "x", "sheduler": 1, "n" * 500: 2})
    assert len(warnings) == 2
    assert "'sheduler'" in warnings[0]
    assert len(warnings[1]) < 200


async def test_many_unknown_names_are_summed_up() -> None:
    checker = ParameterChecker(Schemas().fetch)
    warnings = await checker.check("a/b", {"image": "x", **{f"n{n}": n for n in range(500)}})
    assert len(warnings) == 21
    assert "480" in warnings[-1]


async def test_many_faults_are_cut_short() -> None:
    schema = {"properties": {f"n{n}": {"type": "string"} for n in range(100)}}
    assert len(await faults({f"n{n}": n for n in range(100)}, schema)) == 20


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {},
        {"type": "nonsense"},
        {"properties": {"width": {"type": "integer", "exclusiveMinimum": True}}},
        {"properties": {"width": {"$ref": "#/nowhere"}}},
        {"properties": {"width": {"$ref": "http://127.0.0.1:1/schema.json"}}},
        {"properties": {"width": {"$ref": "#"}}, "$ref": "#"},
        ["not a schema"],
        ProviderError(FailureClass.TRANSIENT, "timeout", "Slow."),
        RuntimeError("unforeseen"),
    ],
)
async def test_without_a_usable_schema_nothing_is_checked(schema: Any) -> None:
    assert await faults({"width": "wrong"}, schema) == {}


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("seed", None, True),
        ("scheduler", None, True),
        ("scheduler", "DDIM", True),
        ("scheduler", "webp", False),
        ("width", 512, True),
        ("width", 5120, False),
        ("output_format", None, False),
        ("output_format", "png", False),
    ],
)
async def test_what_a_model_knows(name: str, value: Any, known: bool) -> None:
    checker = ParameterChecker(Schemas().fetch)
    assert await checker.knows("a/b", name, value) is known
    assert not await ParameterChecker(Schemas(None).fetch).knows("a/b", name, value)


class TestBounds:
    """A schema or a value made to be slow costs little; then the provider is the judge."""

    @pytest.mark.parametrize(
        ("schema", "value"),
        [
            ({"type": "string", "pattern": "^(a+)+$"}, "a" * 40 + "!"),
            (
                {
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "pattern": "^(a+)+$",
                },
                "a" * 40 + "!",
            ),
            ({"type": "array", "uniqueItems": True}, [{"n": n} for n in range(5000)]),
            ({"type": "array", "items": {"$ref": "#/components/schemas/tree"}}, list(range(9000))),
            ({"$ref": "#/components/schemas/tree"}, "x"),
            ({"$ref": "#/components/schemas/fork0"}, "x"),
            ({"patternProperties": {"^(a+)+$": {}}}, {"a" * 40 + "!": 1}),
        ],
    )
    async def test_costs_little(self, schema: dict[str, Any], value: Any) -> None:
        branch = {"$ref": "#/components/schemas/tree"}
        # Two ways at each of 40 forks, and none of the ends fits: 2 ** 40 ways to try.
        forks: dict[str, Any] = {
            f"fork{n}": {"anyOf": [{"$ref": f"#/components/schemas/fork{n + 1}"}] * 2}
            for n in range(40)
        }
        ends = {"fork40": {"type": "integer"}, "tree": {"anyOf": [branch, branch]}}
        whole = {"properties": {"slow": schema}, "components": {"schemas": forks | ends}}
        checker = ParameterChecker(Schemas(whole).fetch)
        await checker.check("a/b", {})
        started_at = time.process_time()
        await checker.check("a/b", {"slow": value})
        assert time.process_time() - started_at < 0.5

    async def test_a_reference_to_an_address_is_never_fetched(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[object] = []
        monkeypatch.setattr("urllib.request.urlopen", lambda *args, **_: asked.append(args))
        schema = {"properties": {"width": {"$ref": "http://169.254.169.254/latest"}}}
        assert await faults({"width": 1}, schema) == {}
        assert asked == []

    async def test_messages_do_not_echo_values(self) -> None:
        found = await faults({"width": "x" * 100_000, "scheduler": "y" * 100_000})
        assert all(len(message) < 300 for message in found.values())


class TestCache:
    async def test_a_schema_is_fetched_once_an_hour(self) -> None:
        schemas, clock = Schemas(), Clock()
        checker = ParameterChecker(schemas.fetch, clock)
        for moment in (0, 1800, 3599):
            clock.now = 1000.0 + moment
            await checker.check("a/b", {"image": "x"})
        assert schemas.fetched == ["a/b"]
        for moment in (3600, 3631, 7199):
            clock.now = 1000.0 + moment
            await checker.check("a/b", {"image": "x"})
            await asyncio.gather(*checker._fetches)
            assert schemas.fetched == ["a/b", "a/b"]

    @pytest.mark.parametrize("answer", [None, RuntimeError("away")])
    async def test_a_miss_is_asked_again_after_half_a_minute(self, answer: Any) -> None:
        schemas, clock = Schemas(answer), Clock()
        checker = ParameterChecker(schemas.fetch, clock)
        for moment in (0, 29):
            clock.now = 1000.0 + moment
            await checker.check("a/b", {"width": "x"})
        assert len(schemas.fetched) == 1
        clock.now = 1000.0 + 30
        schemas.answer = SCHEMA
        assert await checker.check("a/b", {"width": "x"}) == []  # it does not wait again
        await asyncio.gather(*checker._fetches)
        with pytest.raises(InvalidInput):
            await checker.check("a/b", {"width": "x"})

    async def test_a_create_waits_again_for_what_was_missed(self) -> None:
        schemas, clock = Schemas(RuntimeError("away")), Clock()
        checker = ParameterChecker(schemas.fetch, clock)
        assert not await checker.knows("a/b", "width")
        clock.now += 30
        schemas.answer = SCHEMA
        assert await checker.knows("a/b", "width")

    @pytest.mark.parametrize("hangs", [True, False])
    async def test_what_was_known_is_while_the_provider_is_away(
        self, hangs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parameters, "WAIT_SECONDS", 60)
        schemas, clock = Schemas(), Clock()
        checker = ParameterChecker(schemas.fetch, clock)
        assert await checker.knows("a/b", "width")
        clock.now += 3600
        schemas.answer = RuntimeError("away")
        if hangs:
            schemas.gate.clear()
        async with asyncio.timeout(30):
            assert await checker.knows("a/b", "width")
        schemas.gate.set()
        await asyncio.sleep(0)
        schemas.answer = {"properties": {}}
        clock.now += 30
        assert await checker.knows("a/b", "width")  # nobody waits for the new one
        await asyncio.gather(*checker._fetches)
        assert not await checker.knows("a/b", "width")
        assert len(schemas.fetched) == 3

    async def test_concurrent_requests_share_one_fetch(self) -> None:
        schemas = Schemas()
        schemas.gate.clear()
        checker = ParameterChecker(schemas.fetch)
        checks = [asyncio.create_task(checker.check("a/b", {"image": "x"})) for _ in range(50)]
        await asyncio.sleep(0)
        schemas.gate.set()
        assert await asyncio.gather(*checks) == [[]] * 50
        assert schemas.fetched == ["a/b"]

    async def test_a_hanging_fetch_is_waited_for_once_and_used_when_it_arrives(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parameters, "WAIT_SECONDS", 0.05)
        schemas, clock = Schemas(), Clock()
        schemas.gate.clear()
        checker = ParameterChecker(schemas.fetch, clock)
        assert await checker.check("a/b", {"width": "x"}) == []
        clock.now += 0.05
        monkeypatch.setattr(asyncio, "wait", _never_longer_than(0))
        assert await checker.check("a/b", {"width": "x"}) == []
        monkeypatch.undo()
        schemas.gate.set()
        with pytest.raises(InvalidInput):
            await checker.check("a/b", {"width": "x"})
        assert schemas.fetched == ["a/b"]

    async def test_a_client_that_leaves_does_not_stop_the_fetch_of_the_others(self) -> None:
        schemas = Schemas()
        schemas.gate.clear()
        checker = ParameterChecker(schemas.fetch)
        leaver = asyncio.create_task(checker.check("a/b", {"image": "x"}))
        stayer = asyncio.create_task(checker.check("a/b", {"image": "x"}))
        await asyncio.sleep(0)
        leaver.cancel()
        schemas.gate.set()
        assert await stayer == []

    async def test_the_number_of_models_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parameters, "MAX_MODELS", 3)
        schemas = Schemas()
        checker = ParameterChecker(schemas.fetch)
        for name in "abcd":
            await checker.check(name, {"image": "x"})
        await checker.check("d", {"image": "x"})
        assert schemas.fetched == list("abcd")
        await checker.check("a", {"image": "x"})
        assert schemas.fetched == list("abcda")

    async def test_the_number_of_open_fetches_is_bounded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parameters, "WAIT_SECONDS", 0)
        monkeypatch.setattr(parameters, "MAX_FETCHES", 2)
        schemas = Schemas()
        schemas.gate.clear()
        checker = ParameterChecker(schemas.fetch)
        for name in "abc":
            assert await checker.check(name, {"width": "x"}) == []
        await asyncio.sleep(0)
        assert schemas.fetched == ["a", "b"]
        await checker.aclose()

    async def test_closing_stops_open_fetches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parameters, "WAIT_SECONDS", 0)
        schemas = Schemas()
        schemas.gate.clear()
        checker = ParameterChecker(schemas.fetch)
        await checker.check("a/b", {})
        await checker.aclose()
        assert not [task for task in asyncio.all_tasks() if "input-schema" in task.get_name()]


def _never_longer_than(seconds: float) -> Any:
    """`asyncio.wait` that fails the test when asked to wait longer."""
    wait = asyncio.wait

    async def checked(tasks: Any, *, timeout: float) -> Any:
        assert timeout <= seconds + 1e-9
        return await wait(tasks, timeout=timeout)

    return checked
