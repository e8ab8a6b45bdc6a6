"""A report or a study as one HTML file, and its charts as files for a paper. matplotlib draws, jinja2 fills in the page."""
