"""What is shown: the report as text, table, page and pictures."""
