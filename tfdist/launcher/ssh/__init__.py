"""Tasks on other machines, by ssh."""
