"""The command line: one module per command, which says what it takes and prints what others compute.

Nothing here imports torch or transformers before a command runs, so that `larosa --help` answers at once.
"""
