"""The process of one generation: imports the handlers once, and forks children that have them."""
