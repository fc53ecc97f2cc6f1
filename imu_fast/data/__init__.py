"""Users' data files."""
