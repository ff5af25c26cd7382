"""Commands executed in containers."""
