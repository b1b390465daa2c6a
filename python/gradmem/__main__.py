"""``python -m gradmem`` is the ``gradmem`` command."""

from gradmem.cli import app

app(prog_name="gradmem")
