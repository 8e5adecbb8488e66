"""The model that talks in the tests of inference."""

from tests.inference.conftest import base, run, talker  # noqa: F401
