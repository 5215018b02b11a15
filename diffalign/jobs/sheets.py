"""Two columns of names and what is to be said of them, as commands that tell print them."""

from rich import box
from rich.table import Table


def sheet(title: str | None = None) -> Table:
    """Return an empty table for `add_row(name, text)`."""
    table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table
