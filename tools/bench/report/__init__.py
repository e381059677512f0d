"""What is made of a run: text for a terminal, JSON for machines, plots, and a page."""
