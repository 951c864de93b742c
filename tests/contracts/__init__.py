"""What every adapter of a port must do: one suite per port, run against each adapter.

The test module of an adapter derives a `Test...` class and says how the adapter is made.
"""

import pytest

pytest.register_assert_rewrite("tests.contracts.provider", "tests.contracts.storage")
