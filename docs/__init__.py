"""The pages of the project, and the code that writes their tables and builds the site; not part of the wheel."""
