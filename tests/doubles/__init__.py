"""Stand-ins for services the tests cannot call, each spoken to over its real protocol."""
