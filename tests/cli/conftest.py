"""The model that talks in the tests of inference."""

from tests.inference.conftest import base, chat_model, run  # noqa: F401
