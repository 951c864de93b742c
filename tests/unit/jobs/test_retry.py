"""From a failure to a decision: the whole arithmetic, as a table."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import FailureClass, ProviderError
from app.jobs.retry import Retry, RetryPolicy, backoff_seconds, decide

POLICY = RetryPolicy(max_retries=3, backoff_factor=2, backoff_max_seconds=300, grace_seconds=3)


def failure(failure_class: FailureClass, retry_after_seconds: float | None = None) -> ProviderError:
    return ProviderError(failure_class, "code", "words", retry_after_seconds=retry_after_seconds)


def decision(
    failure_class: FailureClass,
    *,
    retries: int = 0,
    throttles: int = 0,
    asked: float | None = None,
    jitter: float = 0.0,
    policy: RetryPolicy = POLICY,
) -> Retry | None:
    return decide(
        failure(failure_class, asked),
        retry_count=retries,
        throttle_count=throttles,
        policy=policy,
        jitter=jitter,
    )


class TestBackoffSeconds:
    @pytest.mark.parametrize(
        ("retry", "factor", "longest", "jitter", "seconds"),
        [
            # factor ** n
            (1, 2, 300, 0.0, 2),  # 2 ** 1
            (2, 2, 300, 0.0, 4),  # 2 ** 2
            (3, 2, 300, 0.0, 8),  # 2 ** 3
            (8, 2, 300, 0.0, 256),  # 2 ** 8
            (1, 3, 300, 0.0, 3),  # 3 ** 1
            (4, 3, 300, 0.0, 81),  # 3 ** 4
            (2, 1.5, 300, 0.0, 2.25),  # 1.5 ** 2
            (5, 1, 300, 0.0, 1),  # 1 ** 5: always one second
            # the cap
            (9, 2, 300, 0.0, 300),  # min(2 ** 9 = 512, 300)
            (2, 60, 300, 0.0, 300),  # min(60 ** 2 = 3600, 300)
            (1, 2, 0, 0.0, 0),  # min(2, 0)
            (100_000, 60, 300, 0.0, 300),  # no overflow on the way to the cap
            # jitter: up to a tenth on top, on top of the cap too
            (1, 2, 300, 0.5, 2.1),  # 2 * (1 + 0.1 * 0.5)
            (3, 2, 300, 1.0, 8.8),  # 8 * (1 + 0.1 * 1)
            (9, 2, 300, 1.0, 330),  # 300 * 1.1
        ],
    )
    def test_is_factor_to_the_n_capped_plus_jitter(
        self, retry: int, factor: float, longest: float, jitter: float, seconds: float
    ) -> None:
        policy = RetryPolicy(3, factor, longest, 0)
        assert backoff_seconds(retry, policy, jitter) == pytest.approx(seconds)

    @settings(deadline=None)  # a busy machine is no failure
    @given(
        retry=st.integers(1, 1000),
        factor=st.floats(1, 60),
        longest=st.floats(0.001, 86_400),
        jitter=st.floats(0, 1, exclude_max=True),
    )
    def test_is_never_early_and_never_more_than_a_tenth_late(
        self, retry: int, factor: float, longest: float, jitter: float
    ) -> None:
        policy = RetryPolicy(3, factor, longest, 0)
        exact = min(factor ** min(retry, 64), longest)
        assert exact <= backoff_seconds(retry, policy, jitter) <= exact * 1.1
        assert backoff_seconds(retry + 1, policy, jitter) >= backoff_seconds(retry, policy, jitter)


class TestDecide:
    @pytest.mark.parametrize(
        ("failure_class", "retries", "throttles", "asked", "wanted"),
        [
            # transient: the n-th retry waits 2 ** n, and after the third it is over
            (FailureClass.TRANSIENT, 0, 0, None, Retry(2, retries=1)),
            (FailureClass.TRANSIENT, 1, 0, None, Retry(4, retries=1)),
            (FailureClass.TRANSIENT, 2, 0, None, Retry(8, retries=1)),
            (FailureClass.TRANSIENT, 3, 0, None, None),
            (FailureClass.TRANSIENT, 9, 0, None, None),
            (FailureClass.TRANSIENT, 0, 50, None, Retry(2, retries=1)),  # throttles cost nothing
            # throttled: as asked, else 2 ** n of its own count; never an attempt, never the end
            (FailureClass.THROTTLED, 0, 0, 5.0, Retry(5, throttles=1)),
            (FailureClass.THROTTLED, 3, 0, 5.0, Retry(5, throttles=1)),
            (FailureClass.THROTTLED, 0, 9, 0.5, Retry(0.5, throttles=1)),
            (FailureClass.THROTTLED, 0, 0, 3600.0, Retry(3600, throttles=1)),
            (FailureClass.THROTTLED, 0, 0, None, Retry(2, throttles=1)),
            (FailureClass.THROTTLED, 0, 1, None, Retry(4, throttles=1)),
            (FailureClass.THROTTLED, 0, 2, None, Retry(8, throttles=1)),
            (FailureClass.THROTTLED, 0, 99, None, Retry(300, throttles=1)),
            (FailureClass.THROTTLED, 3, 10**6, None, Retry(300, throttles=1)),
            # unavailable: 2 ** n of the waits so far; never an attempt, never the end
            (FailureClass.UNAVAILABLE, 0, 0, None, Retry(2, throttles=1)),
            (FailureClass.UNAVAILABLE, 3, 2, None, Retry(8, throttles=1)),
            (FailureClass.UNAVAILABLE, 3, 99, None, Retry(300, throttles=1)),
            # ambiguous: looks again, costs nothing, never gives up here
            (FailureClass.AMBIGUOUS, 0, 0, None, Retry(3)),  # 2 ** 1 is less than the grace
            (FailureClass.AMBIGUOUS, 3, 0, None, Retry(16)),  # 2 ** 4
            (FailureClass.AMBIGUOUS, 99, 0, None, Retry(300)),
            # internal: our own fault, every 5 s, costs nothing
            (FailureClass.INTERNAL, 0, 0, None, Retry(5)),
            (FailureClass.INTERNAL, 3, 99, None, Retry(5)),
            # permanent: at once, however many retries are left
            (FailureClass.PERMANENT, 0, 0, None, None),
            (FailureClass.PERMANENT, 3, 0, 5.0, None),
        ],
    )
    def test_every_class(
        self,
        failure_class: FailureClass,
        retries: int,
        throttles: int,
        asked: float | None,
        wanted: Retry | None,
    ) -> None:
        found = decision(failure_class, retries=retries, throttles=throttles, asked=asked)
        assert found == wanted

    @pytest.mark.parametrize(
        ("failure_class", "asked", "seconds"),
        [
            (FailureClass.TRANSIENT, None, 2.1),  # 2 * (1 + 0.1 * 0.5)
            (FailureClass.AMBIGUOUS, None, 3),  # the grace, not jittered
            (FailureClass.INTERNAL, None, 5.25),  # 5 * 1.05
            (FailureClass.THROTTLED, 8.0, 8.4),  # 8 * 1.05: later than asked, never earlier
            (FailureClass.THROTTLED, None, 2.1),  # jittered once, not twice
        ],
    )
    def test_jitter_is_added_once(
        self, failure_class: FailureClass, asked: float | None, seconds: float
    ) -> None:
        found = decision(failure_class, asked=asked, jitter=0.5)
        assert isinstance(found, Retry)
        assert found.delay_seconds == pytest.approx(seconds)

    def test_without_retries_the_first_transient_failure_is_the_last(self) -> None:
        policy = RetryPolicy(0, 2, 300, 0)
        assert decision(FailureClass.TRANSIENT, policy=policy) is None

    @pytest.mark.parametrize("failure_class", list(FailureClass))
    def test_the_number_of_attempts_is_bounded(self, failure_class: FailureClass) -> None:
        """However a job fails, what counts as an attempt ends after `max_retries`."""
        attempts, found = 1, decision(failure_class)
        for _ in range(100):
            if found is None:
                break
            attempts += found.retries
            found = decision(failure_class, retries=attempts - 1)
        assert attempts <= 1 + POLICY.max_retries
