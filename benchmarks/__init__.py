"""Measurements, each a module with --quick and --json FILE; and the assets they share."""
