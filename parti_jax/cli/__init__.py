"""Commands that go through several parts of the package."""
