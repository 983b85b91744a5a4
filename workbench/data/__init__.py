"""Readers of published fact files, one format a file. `read_facts` tells the format by its fields."""

from workbench.data.base import Reader, read_facts

__all__ = ["Reader", "read_facts"]
