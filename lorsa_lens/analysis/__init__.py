"""Reading heads: where they get what they write."""
