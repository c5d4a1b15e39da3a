"""Independent references and small graphs for the tests."""
