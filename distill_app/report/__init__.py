"""Everything a person sees of a comparison: page, table, Markdown, cards."""
