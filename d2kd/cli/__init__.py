"""The command ``d2kd``: one module per sub-command, thin over the library.

A module's docstring is its help: the first line says what it does, the rest shows examples. It has
``add_arguments(parser)`` and ``run(args)``, which raises :class:`~d2kd.errors.UserError` for what
the user can fix.
"""
