"""Tools, and the search that ships with them."""
