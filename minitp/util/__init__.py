"""The smaller helpers: environment (the machine and the launcher), stdout, format (text), suggest (typos)."""
