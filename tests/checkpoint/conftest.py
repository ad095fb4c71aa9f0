"""A run of two steps and its checkpoint, shared by tests."""

from tests.support.checkpoints import checkpoint as checkpoint, two_steps as two_steps
