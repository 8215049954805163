"""What the documentation site is built with, beside `mkdocs.yml`: formulas and drawings."""
